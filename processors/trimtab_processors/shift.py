"""The mathematics of control: `logits'[t] = logits[t] + strength * shift[map(t)]` (Wu et al., NeurIPS 2024).

Everything here works on whole batches: `rows` are float32 [requests, control vocabulary], shifts and logits
float32 [requests, target vocabulary].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Routing(Protocol):
    """How rows of a control become shifts over a target's vocabulary."""

    def shift(self, rows: Tensor) -> Tensor:
        """Rows [requests, control vocabulary] to shifts [requests, target vocabulary]."""
        ...


class PmMined:
    """The shift of a target token is that of the one control token that a mapping table names.

    A control's logits carry an arbitrary constant, which training cannot see. So a token without a
    counterpart gets the mean of the shift over the mapped tokens, which leaves it where it was relative to
    them; 0, as in the reference implementation of cross-model control, would boost or suppress it by that
    constant.
    """

    def __init__(
        self,
        mapping: NDArray[np.int32],
        width: int,
        *,
        neutral: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the routing for logits of `width` columns.

        Args:
            mapping: int32 [tokens], -1 where nothing fits; columns past its end count as unmapped.
            width: the columns of the target's logits.
            neutral: unmapped tokens get the mean shift; else 0, to reproduce the reference.
            device: where rows and logits live.
        """
        routed = torch.full((width,), -1, dtype=torch.int64)
        routed[: len(mapping)] = torch.from_numpy(mapping[:width].astype(np.int64))
        mapped = routed[routed >= 0]
        self._source = (routed + 1).to(device)
        """int64 [width]: where each token's shift stands, behind that of the unmapped ones."""
        self._neutral = neutral and bool(len(mapped))
        counts = torch.bincount(mapped)
        self._used = counts.nonzero()[:, 0].to(device)
        """int64 [n]: the control tokens that some target token is mapped to."""
        self._weights = (counts[counts > 0] / max(len(mapped), 1)).float().to(device)
        """float32 [n]: the weight of each in the mean over the mapped tokens."""

    def shift(self, rows: Tensor) -> Tensor:
        if self._neutral:
            rest = (rows.index_select(1, self._used) @ self._weights)[:, None]
        else:
            rest = rows.new_zeros(len(rows), 1)
        return torch.cat((rest, rows), dim=1).index_select(1, self._source)


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
