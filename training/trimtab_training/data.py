"""What a control is trained on: items, and the batches they are put together in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_MULTIPLE = 16
"""Widths of batches are multiples of this: kernels are prepared anew for every new shape."""


@dataclass(frozen=True)
class Item:
    """A prompt and an answer, in the token ids that template and control share."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError(f"an item needs a prompt and an answer of at least one token each: {self}")


@dataclass(frozen=True)
class Lesson:
    """Items under one objective of `objectives.OBJECTIVES`, `per_step` of which are drawn for every step."""

    objective: str
    items: tuple[Item, ...]
    per_step: int


@dataclass(frozen=True)
class Batch:
    """Items side by side.

    ids: int64 [items, width], padded on the right, so that causal attention needs no mask.
    rows, columns: int64 [tokens], where the logits of each answer token stand.
    targets: int64 [tokens], the answer tokens, item after item.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """int64 [sequences, width], padded on the right to the next multiple of `PAD_MULTIPLE`."""
    width = -(-max(map(len, sequences)) // PAD_MULTIPLE) * PAD_MULTIPLE
    return torch.tensor([[*sequence, *[pad_id] * (width - len(sequence))] for sequence in sequences])


def collate(items: Sequence[Item], pad_id: int) -> Batch:
    rows = [row for row, item in enumerate(items) for _ in item.answer]
    columns = [len(item.prompt) - 1 + i for item in items for i in range(len(item.answer))]
    return Batch(
        ids=pad([item.prompt + item.answer for item in items], pad_id),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor([token for item in items for token in item.answer]),
    )
