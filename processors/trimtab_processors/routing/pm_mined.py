"""PM-MinED: each target token gets the shift of one control token, which a mapping table names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trimtab_processors.routing.base import PlainShift
from trimtab_processors.routing.shift import scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trimtab_processors.routing.base import Lookahead, Pair
    from trimtab_processors.routing.pieces import PendingSpelling


class PmMinedRouting:
    """The shift of a target token is that of the one control token that a mapping table names.

    A control's logits carry an arbitrary constant, which training cannot see. So a token without a
    counterpart gets the mean of the shift over the mapped tokens, which leaves it where it was relative to
    them; 0, as in the reference implementation of cross-model control, would boost or suppress it by that
    constant.
    """

    longest = 0
    children: Mapping[tuple[int, int], int] = MappingProxyType({})

    def __init__(
        self,
        mapping: NDArray[np.int32],
        width: int,
        *,
        neutral: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the routing for logits of `width` columns.

        Args:
            mapping: int32 [tokens], -1 where nothing fits; columns past its end count as unmapped.
            width: the columns of the target's logits.
            neutral: unmapped tokens get the mean shift; else 0, to reproduce the reference.
            device: where rows and logits live.
        """
        routed = torch.full((width,), -1, dtype=torch.int64)
        routed[: len(mapping)] = torch.from_numpy(mapping[:width].astype(np.int64))
        mapped = routed[routed >= 0]
        self._source = (routed + 1).to(device)
        """int64 [width]: where each token's shift stands, behind that of the unmapped ones."""
        self._neutral = neutral and bool(len(mapped))
        counts = torch.bincount(mapped)
        self._used = counts.nonzero()[:, 0].to(device)
        """int64 [n]: the control tokens that some target token is mapped to."""
        self._weights = (counts[counts > 0] / max(len(mapped), 1)).float().to(device)
        """float32 [n]: the weight of each in the mean over the mapped tokens."""

    def routed(self, rows: Tensor) -> Tensor:
        """Return the rows over the target's vocabulary, float32 [requests, target vocabulary]."""
        if self._neutral:
            rest = (rows.index_select(1, self._used) @ self._weights)[:, None]
        else:
            rest = rows.new_zeros(len(rows), 1)
        return torch.cat((rest, rows), dim=1).index_select(1, self._source)

    def lookahead(self, rows: Tensor) -> None:  # noqa: ARG002 - of the protocol
        return None

    def shift(
        self,
        rows: Tensor,
        strengths: Tensor,
        lookahead: Lookahead | None = None,  # noqa: ARG002 - of the protocol
        ahead: Tensor | None = None,  # noqa: ARG002
        pending: Sequence[PendingSpelling] = (),  # noqa: ARG002
    ) -> PlainShift:
        return PlainShift(*scaled(self.routed(rows), strengths))


def make(pair: Pair) -> PmMinedRouting:
    """Make the routing of a pair."""
    return PmMinedRouting(pair.table.mapping, pair.width, neutral=pair.neutral, device=pair.device)
