"""Signals that end a command as an exit does; tests/training/demo/test_child.py sends them."""

from __future__ import annotations

import signal

from trimtab_training.world.signals import signals_as_exits


def test_after_the_block_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with signals_as_exits():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
