"""The mathematics of control: `logits'[t] = logits[t] + strength * shift[map(t)]` (Wu et al., NeurIPS 2024).

Everything here works on whole batches: shifts and logits are float32 [requests, target vocabulary]. How a
control's rows become shifts is a routing's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def scaled(shift: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    """`strengths[i] * shift[i]`, and 0 for a row of which that is not finite.

    Args:
        shift: float32 [requests, target vocabulary].
        strengths: float32 [requests].

    Returns:
        float32 [requests, target vocabulary], and bool [requests]: which rows are finite.
    """
    product = shift * strengths[:, None]
    finite = product.sum(dim=1).isfinite()
    return torch.where(finite[:, None], product, 0.0), finite


def guarded(
    shift: Tensor, logits: Tensor, index: Tensor, top_k: Sequence[int], min_p: Sequence[float]
) -> Tensor:
    """Return `shift` with 0 for the tokens that a request's guards exclude.

    Args:
        shift: float32 [requests, target vocabulary].
        logits: float [rows, target vocabulary], before anything is added to them.
        index: int64 [requests], which row of them each request has.
        top_k: [requests], see `within_guards`.
        min_p: [requests], see `within_guards`.
    """
    places = [place for place, guards in enumerate(zip(top_k, min_p, strict=True)) if any(guards)]
    if not places:
        return shift
    limits = torch.tensor([top_k[place] for place in places], device=logits.device)
    shares = torch.tensor([min_p[place] for place in places], device=logits.device)
    shift = shift.clone()
    shift[places] = within_guards(logits[index[places]], shift[places], limits, shares, max(top_k))
    return shift


def within_guards(logits: Tensor, shift: Tensor, top_k: Tensor, min_p: Tensor, largest_k: int) -> Tensor:
    """Return `shift` with 0 for all but the tokens that the target finds likely.

    Args:
        logits: float [n, width], the target's own.
        shift: float [n, width].
        top_k: int64 [n], the number of its likeliest tokens that keep their shift; 0: all.
        min_p: float32 [n], the share of its likeliest token's probability that a token needs; 0: none.
        largest_k: an upper bound of `top_k`; 0 if no row has one.
    """
    least = logits.amax(dim=1, keepdim=True) + min_p.log()[:, None]
    if largest_k:
        best = logits.topk(min(largest_k, logits.shape[1]), dim=1).values
        lowest = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1)[:, None])
        least = torch.maximum(least, torch.where(top_k[:, None] > 0, lowest, -torch.inf))
    return torch.where(logits >= least, shift, 0.0)
