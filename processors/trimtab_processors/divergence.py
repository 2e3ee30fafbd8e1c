"""How far a control moves the target's next-token distribution, measured on a sample of steps."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(controlled: Tensor, own: Tensor) -> Tensor:
    """KL(controlled || own), in nats.

    Args:
        controlled: float [vocabulary], logits after control.
        own: float [vocabulary], the target's own; -inf where those are, and only there.

    Returns:
        float32 [].
    """
    after, before = controlled.float().log_softmax(dim=0), own.float().log_softmax(dim=0)
    probability = after.exp()
    # what a grammar masks is -inf in both, and adds nothing
    return torch.where(probability > 0, probability * (after - before), 0.0).sum().clamp(min=0)


class Sample:
    """Which steps are measured, and in each of them one row: so the cost has a bound, whatever the batch."""

    def __init__(self, every: int) -> None:
        """Measure one step in `every`; 0: none."""
        self._every = every
        self._steps = 0

    def pick(self, rows: int) -> int | None:
        """Once a step with so many controlled rows, one at least: which of them is measured, another one each
        time; None in most steps.
        """
        self._steps += 1
        if not self._every or self._steps % self._every:
            return None
        return self._steps // self._every % rows
