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
        self._mapped = routed[routed >= 0].to(device)
        self._where = torch.nonzero(routed >= 0)[:, 0].to(device)
        self._neutral = neutral
        self.width = width

    def shift(self, rows: Tensor) -> Tensor:
        mapped = rows[:, self._mapped]
        rest = (
            mapped.mean(dim=1, keepdim=True)
            if self._neutral and mapped.shape[1]
            else rows.new_zeros(len(rows), 1)
        )
        return rest.expand(-1, self.width).index_copy(1, self._where, mapped)


def apply_shift(logits: Tensor, rows: Sequence[int], shift: Tensor, strengths: Tensor) -> Tensor:
    """Add `strengths[i] * shift[i]` to row `rows[i]` of `logits`, in place.

    -inf in the logits (a grammar's mask) stays -inf. A shift that is not finite leaves its row alone.

    Returns:
        bool [requests]: which rows were shifted.
    """
    scaled = shift * strengths[:, None]
    finite = scaled.isfinite().all(dim=1)
    scaled = torch.where(finite[:, None], scaled, 0.0)
    logits.index_add_(0, torch.tensor(rows, device=logits.device), scaled.to(logits.dtype))
    return finite
