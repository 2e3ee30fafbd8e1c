"""The error with which a training ends that can't start or continue."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The training can't start or go on; the message says why and what to do."""
