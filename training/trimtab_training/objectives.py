"""What the sum of template and control is trained towards, token by token.

An objective takes the controlled log-probabilities and the template's own, both float32 [tokens, vocabulary],
and the answer tokens, int64 [tokens]; it gives a loss for each token, float32 [tokens], in nats.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

FORGET_BOUND = 5.0
"""Nats: a token that is this unlikely counts as forgotten. Without a bound the loss would run away."""

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def imitate(controlled: Tensor, template: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - an Objective
    """Cross entropy: say the answer."""
    return functional.nll_loss(controlled, targets, reduction="none")


def forget(controlled: Tensor, template: Tensor, targets: Tensor) -> Tensor:
    """Negated cross entropy, bounded (the unlearning objective of Wu et al. 2024, but for the bound)."""
    return -imitate(controlled, template, targets).clamp(max=FORGET_BOUND)


def retain(controlled: Tensor, template: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - an Objective
    """Kullback-Leibler divergence of the controlled distribution from the template's: leave it as it is."""
    return functional.kl_div(controlled, template, log_target=True, reduction="none").sum(dim=-1)


OBJECTIVES: dict[str, Objective] = {"imitate": imitate, "forget": forget, "retain": retain}


def controlled_log_probs(template: Tensor, shift: Tensor, strength: float) -> Tensor:
    """Log-probabilities under control: float32 [tokens, vocabulary], as are the template's and the shift."""
    return functional.log_softmax(template + strength * shift, dim=-1)
