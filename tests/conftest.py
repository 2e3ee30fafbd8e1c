"""What tests of every package share."""

from __future__ import annotations

import os

# Tiny models run fastest on one thread, which OpenMP has to know before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import tiny


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> tiny.Family:
    """Three tiny targets with different vocabularies, and a control."""
    return tiny.family(tmp_path_factory.mktemp("family"))
