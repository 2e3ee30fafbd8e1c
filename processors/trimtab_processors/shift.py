"""The mathematics of control: `logits'[t] = logits[t] + strength * shift[map(t)]` (Wu et al., NeurIPS 2024).

Everything here works on whole batches: shifts and logits are float32 [requests, target vocabulary]. How a
control's rows become shifts is `routing`'s.
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


def guarded(shift: Tensor, logits: Tensor, rows: Sequence[int], most: Sequence[int]) -> Tensor:
    """`shift` with 0 for all but the likeliest tokens, where a request asks for that.

    Args:
        shift: float32 [requests, target vocabulary].
        logits: float [rows, target vocabulary], before anything is added to them.
        rows: [requests], where each request's logits are.
        most: [requests], of each request only the so many likeliest tokens are shifted; 0: all of them.
    """
    places = [place for place, limit in enumerate(most) if limit]
    if not places:
        return shift
    limits = torch.tensor([most[place] for place in places], device=logits.device)
    own = logits[[rows[place] for place in places]]
    shift = shift.clone()
    shift[places] = of_likeliest(own, shift[places], limits, max(most))
    return shift


def add_shift(logits: Tensor, rows: Sequence[int], shift: Tensor) -> None:
    """Add `shift[i]`, float32 [requests, target vocabulary], to row `rows[i]` of `logits`, in place.

    -inf in the logits (a grammar's mask) stays -inf.
    """
    logits.index_add_(0, torch.tensor(rows, device=logits.device), shift.to(logits.dtype))


def of_likeliest(logits: Tensor, shift: Tensor, limits: Tensor, most: int) -> Tensor:
    """`shift` with 0 for all but the likeliest tokens.

    Args:
        logits: float [n, width].
        shift: float [n, width].
        limits: int64 [n], of each row only so many of the likeliest tokens keep their shift; 0: all of them.
        most: the highest of `limits`, at least.
    """
    best = logits.topk(min(most, logits.shape[1]), dim=1).values
    least = best.gather(1, (limits - 1).clamp(0, best.shape[1] - 1)[:, None])
    return torch.where((limits[:, None] == 0) | (logits >= least), shift, 0.0)
