"""How models are trained. Kept apart from the training, so that reading a setting loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """How a base model is trained from scratch."""

    steps: int = 420
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: int = 20
    clip: float = 1.0


@dataclass(frozen=True)
class ControlSettings:
    """How a control is trained.

    strengths: the range from which every step draws its strength, so that the control works at all of them.
    shift_penalty: the factor on the mean square of the shift, which keeps it small where nothing asks for it.
    """

    steps: int = 300
    learning_rate: float = 3e-3
    strengths: tuple[float, float] = (0.6, 1.2)
    shift_penalty: float = 1e-3
    clip: float = 1.0
