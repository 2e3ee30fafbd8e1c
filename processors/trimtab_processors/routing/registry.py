"""The routings by name.

A new one is a module with a `make`, a line here, and its name in `pack` and `parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from trimtab_processors.pack import PATH, PIECES, PM_MINED
from trimtab_processors.routing import path, pieces, pm_mined

if TYPE_CHECKING:
    from trimtab_processors.routing.base import Pair, Routing

ROUTINGS: Mapping[str, Callable[[Pair], Routing]] = {
    PM_MINED: pm_mined.make,
    PATH: path.make,
    PIECES: pieces.make,
}
