"""Attention over a block pool, plugged into transformers models through their attention interface.

One call of the model serves sequences at any stage: its input is the concatenation of every sequence's new
tokens, and this module writes their keys and values into the pool and attends each to its own context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trimtab_processors.cache import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "trimtab_ragged"
_UNSUPPORTED = ("softcap", "s_aux", "sinks")


@dataclass(frozen=True)
class Group:
    """Sequences with as many new tokens and contexts of like length, attended in one call."""

    index: Tensor
    """int64 [sequences, new]: where their new tokens stand in the flat batch."""
    positions: Tensor
    """int64 [sequences, new]: the new tokens' positions in their contexts."""
    slots: Tensor
    """int64 [sequences, context]: the slots of their contexts, the new tokens included; padded with any
    slot."""

    def mask(self, window: int | None) -> Tensor:
        """Bool [sequences, 1, new, context]; slot c of a context holds its position c, so padding is the
        future.
        """
        distance = self.positions[:, :, None] - torch.arange(self.slots.shape[1], device=self.slots.device)
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        return visible[:, None]


class KeyValues:
    """Keys and values of every layer, one row for each slot; a layer's tensors are made when it first
    writes.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors [slots, heads, size] of layer `index`, shaped after the new `key` and `value` [tokens,
        heads, size].
        """
        if index not in self._layers:
            self._layers[index] = (
                key.new_zeros((self.slots, *key.shape[1:])),
                value.new_zeros((self.slots, *value.shape[1:])),
            )
        return self._layers[index]

    def resized(self, slots: int) -> KeyValues:
        """Empty tensors like these, of `slots` slots, made at once: what an engine measures stays as it
        is.
        """
        other = KeyValues(slots)
        for index, (keys, values) in self._layers.items():
            other.layer(index, keys, values)
        return other

    def clear(self, slots: Tensor) -> None:
        """Forget what stands in `slots`, int64 [n]: masked or not, a NaN reaches whoever attends to it."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor.index_fill_(0, slots, 0)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)


@dataclass(frozen=True)
class Step:
    """What one call of the model attends to."""

    cache: KeyValues
    slots: Tensor
    """int64 [tokens]: where each new token's key and value go."""
    groups: Sequence[Group]


def slots_of(blocks: Tensor) -> Tensor:
    """The slots of blocks, int64 [..., n] to [..., n * block size]."""
    return (blocks[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=blocks.device)).flatten(-2)


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - part of the interface; the step knows what is visible
    *,
    scaling: float | None = None,
    trimtab_step: Step,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend the flat batch: query [1, heads, tokens, size], key and value [1, kv heads, tokens, size].

    Returns:
        [1, tokens, heads, size], and no weights.

    Raises:
        NotImplementedError: the architecture wants a variant of attention that is not offered here.
    """
    if extra := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(extra)} is not supported in a control model")
    queries, new_keys, new_values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    keys, values = trimtab_step.cache.layer(int(module.layer_idx), new_keys, new_values)  # type: ignore[arg-type]
    keys[trimtab_step.slots] = new_keys
    values[trimtab_step.slots] = new_values
    output = torch.empty((*queries.shape[:2], values.shape[2]), dtype=queries.dtype, device=queries.device)
    for group in trimtab_step.groups:
        attended = scaled_dot_product_attention(
            queries[group.index].transpose(1, 2),
            keys[group.slots].transpose(1, 2),
            values[group.slots].transpose(1, 2),
            attn_mask=group.mask(kwargs.get("sliding_window")),
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        output[group.index] = attended.transpose(1, 2)
    return output[None], None


AttentionInterface.register(NAME, ragged_attention)
