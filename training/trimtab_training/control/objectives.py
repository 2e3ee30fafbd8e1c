"""What the sum of template and control is trained towards.

An objective takes the controlled log-probabilities and those of a reference, both float32
[tokens, vocabulary], the answer tokens, int64 [tokens], and the number of tokens in each answer. It returns
a loss in nats for each unit that its mean is taken over: a token, or an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from trimtab_training.control.recipe import DataSet

Loss = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss, and whether its units are answers; else they are tokens."""

    loss: Loss
    by_answer: bool = False

    def units(self, lengths: Sequence[int]) -> int:
        """The number of losses for answers of these lengths."""
        return len(lengths) if self.by_answer else sum(lengths)


def make_objective(data_set: DataSet) -> Objective:
    match data_set.objective:
        case "cross_entropy":
            return Objective(cross_entropy)
        case "forget":
            return Objective(partial(forget, bound=data_set.bound))
        case "npo":
            return Objective(partial(npo, beta=data_set.beta), by_answer=True)
        case "retain" | "distill":
            return Objective(divergence)


def controlled_log_probs(template: Tensor, shift: Tensor, strength: float) -> Tensor:
    """Log-probabilities under control: float32 [tokens, vocabulary], as the template's and the shift."""
    return functional.log_softmax(template + strength * shift, dim=-1)


def cross_entropy(
    controlled: Tensor,
    reference: Tensor,  # noqa: ARG001 - a Loss
    targets: Tensor,
    lengths: Sequence[int],  # noqa: ARG001
) -> Tensor:
    """Negative log-probability of the answer's tokens: say the answer."""
    return functional.nll_loss(controlled, targets, reduction="none")


def forget(
    controlled: Tensor,
    reference: Tensor,
    targets: Tensor,
    lengths: Sequence[int],
    *,
    bound: float | None,
) -> Tensor:
    """Negated cross entropy. A token whose cross entropy is at the bound counts as forgotten.

    Without a bound it is the unlearning objective of Wu et al. 2024, which has no minimum.
    """
    loss = cross_entropy(controlled, reference, targets, lengths)
    return -(loss if bound is None else loss.clamp(max=bound))


def npo(
    controlled: Tensor, reference: Tensor, targets: Tensor, lengths: Sequence[int], *, beta: float
) -> Tensor:
    """Negative preference optimisation of each answer (Zhang et al. 2024, arXiv 2404.05868).

    The reference is the template, and an answer's cross entropy is summed over its tokens.
    """
    gained = functional.nll_loss(controlled, targets, reduction="none") - functional.nll_loss(
        reference, targets, reduction="none"
    )
    answers = torch.stack([part.sum() for part in torch.split(gained, list(lengths))])
    return -2 / beta * functional.logsigmoid(beta * answers)


def divergence(
    controlled: Tensor,
    reference: Tensor,
    targets: Tensor,  # noqa: ARG001 - a Loss
    lengths: Sequence[int],  # noqa: ARG001
) -> Tensor:
    """Kullback-Leibler divergence of the controlled distribution from the reference's."""
    return functional.kl_div(controlled, reference, log_target=True, reduction="none").sum(dim=-1)
