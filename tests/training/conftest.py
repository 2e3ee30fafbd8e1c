"""What the tests of the training share."""

from __future__ import annotations

import pytest

from miniature import miniature
from trimtab_training.world.world import World, make_world


@pytest.fixture(scope="session")
def mini_world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("worlds") / "world", 5, settings=miniature(), jobs=1)
