"""Log-probabilities of which the likeliest are kept exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopLogProbs:
    """The likeliest tokens at some positions; the rest is one bucket, spread evenly over its tokens.

    ids: int64 [positions, width]; a token that is repeated has the same log-probability each time.
    log_probs: float32 [positions, width].
    kept: int64 [positions], the number of different tokens.
    rest: float32 [positions], the logarithm of the bucket's mass.
    """

    ids: Tensor
    log_probs: Tensor
    kept: Tensor
    rest: Tensor

    def __getitem__(self, positions: slice) -> TopLogProbs:
        parts = (self.ids, self.log_probs, self.kept, self.rest)
        return TopLogProbs(*(part[positions] for part in parts))

    def dense(self, vocabulary: int) -> Tensor:
        """float32 [positions, vocabulary]."""
        even = self.rest - torch.log(vocabulary - self.kept.float())
        return even[:, None].expand(-1, vocabulary).scatter(1, self.ids, self.log_probs)
