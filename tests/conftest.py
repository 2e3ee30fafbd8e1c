"""What tests of every package share."""

from __future__ import annotations

import pytest

import tiny


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> tiny.Family:
    """Three tiny targets with different vocabularies, and a control."""
    return tiny.family(tmp_path_factory.mktemp("family"))
