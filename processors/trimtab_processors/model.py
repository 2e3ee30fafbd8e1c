"""A control model: loaded from Hugging Face format, run on sequences that share one block pool."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_processors.alignment import common_prefix
from trimtab_processors.attention import NAME, Group, KeyValues, Step, slots_of
from trimtab_processors.cache import BLOCK_SIZE, BlockPool, blocks_for
from trimtab_processors.pack import PackError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEFAULT_MAX_CONTEXT = 2048
_loading = threading.Lock()
"""transformers switches off for all of a process that weights are tied while it loads a model."""


@dataclass(eq=False)
class CachedSequence:
    """One context of one control model: its tokens, and the blocks that hold what was computed of them."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    """Keys and values of tokens[:cached] stand in the blocks."""
    row: Tensor | None = None
    """float32 [vocabulary]: the logits after the last token, where `needs_row` is false."""
    _computed: int | None = None
    """The length of the context that `row` belongs to."""
    _said: int = field(init=False)
    """The length of the context without `_path`."""
    _path: Sequence[int] = ()
    """Tokens at its end that nobody has said yet, see `go_on`."""

    def __post_init__(self) -> None:
        self._said = len(self.tokens)

    def change(self, tokens: list[int], kept: int) -> int:
        """Make `tokens` the context, of which the first `kept` are as they were.

        Returns:
            How many computed tokens are lost, without those that were not said.
        """
        lost = max(0, min(self.cached, self._said) - kept)
        if self._path and kept == self._said:
            kept += common_prefix(tokens[kept:], self._path)
        self.tokens, self._said, self._path = tokens, len(tokens), ()
        if kept == len(tokens) == self._computed:
            return 0
        # The last token is computed even where it is cached: its row is wanted.
        self.cached = min(self.cached, kept, max(len(tokens) - 1, 0))
        self._computed = None
        return lost

    def go_on(self, path: Sequence[int]) -> None:
        """Put `path` behind the context, in place of one that is there, to see what would come next.

        Where the context then does go on so, `change` keeps what was computed.
        """
        said = self._said
        self.change([*self.tokens[:said], *path], said)
        self._said, self._path = said, path

    def complete(self, row: Tensor) -> None:
        """Take `row`, float32 [vocabulary], as the logits after the last token."""
        self.row = row
        self.cached = self._computed = len(self.tokens)

    @property
    def needs_row(self) -> bool:
        return self._computed is None and bool(self.tokens)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.cached


class ControlModel:
    """A small causal language model whose sequences join and leave its batch at any step."""

    def __init__(
        self, location: str, *, cache_bytes: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the model at `location`, a directory or a hub id, safetensors only and without remote code.

        Raises:
            PackError: the model can't be loaded or run; the message names it and why.
        """
        self.location = location
        self.device = device
        try:
            with _loading:
                self._model = AutoModelForCausalLM.from_pretrained(
                    location,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation=NAME,
                )
        except (OSError, ValueError, KeyError) as error:
            raise PackError(f"control model {location!r} can't be loaded: {error}") from error
        self._model.to(device).eval().requires_grad_(False)
        config = self._model.config.get_text_config()
        self.max_context = int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_CONTEXT)
        self.vocab_size = int(config.vocab_size)
        self._owners: dict[CachedSequence, None] = {}
        """The sequences that hold blocks, the one that has not run for longest first."""
        self._make_pool(cache_bytes)

    def _make_pool(self, cache_bytes: int) -> None:
        """Make a pool of `cache_bytes`, or of one whole context where that is more."""
        self._cache, self.pool = KeyValues(2 * BLOCK_SIZE), BlockPool(2)
        try:
            self._probe()
        except (AttributeError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
            raise PackError(f"control model {self.location!r} can't be run: {error!r}") from error
        self._probed = self._cache
        block_bytes = self._probed.bytes // 2
        blocks = max(cache_bytes // block_bytes, blocks_for(self.max_context))
        self._cache, self.pool = self.key_values(blocks), BlockPool(blocks)

    def key_values(self, blocks: int) -> KeyValues:
        """Keys and values of `blocks` blocks, for a caller that lays its batches out itself."""
        return self._probed.resized(blocks * BLOCK_SIZE)

    def _probe(self) -> None:
        """Make sure that sequences do not see each other, nor a sequence what it was not given.

        Layers that bypass the attention interface (convolutions, state spaces) would take the flat batch for
        one sequence, and let one request's text steer another's.

        Raises:
            PackError: they do.
        """
        together = [CachedSequence(tokens=[1, 2, 3]), CachedSequence(tokens=[4, 5, 6, 7, 8])]
        self.run(together)
        for sequence in together:
            sequence.change([*sequence.tokens, 9], len(sequence.tokens))
        self.run(together)
        for sequence in together:
            self.release(sequence)
            alone = CachedSequence(tokens=list(sequence.tokens))
            self.run([alone])
            self.release(alone)
            if not self._cache.bytes or not _equal(alone.row, sequence.row):
                raise PackError(
                    f"control model {self.location!r} has layers that mix the sequences of a batch: only"
                    " decoders whose every layer is attention can be controls"
                )

    @torch.inference_mode()
    def run(self, sequences: Sequence[CachedSequence]) -> None:
        """Compute the row of each of `sequences`, in one ragged batch where the pool has room for all of
        them.

        A sequence has at least one token and at most `max_context`.
        """
        for wave in self._waves(sequences):
            for sequence, row in zip(wave, self.forward(*self._layout(wave)), strict=True):
                sequence.complete(row)

    def forward(self, step: Step, tokens: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Run one flat batch.

        Args:
            step: where keys and values go, and what is attended to.
            tokens: int64 [n], the new tokens.
            positions: int64 [n], their positions in their contexts.
            wanted: int64 [rows], after which of them the logits are wanted.

        Returns:
            float32 [rows, vocabulary].
        """
        logits: Tensor = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            trimtab_step=step,
        ).logits[0]
        return logits.float()

    def release(self, sequence: CachedSequence) -> None:
        """Give the sequence's blocks back; what it cached is lost."""
        self.pool.give(sequence.blocks)
        sequence.blocks, sequence.cached = [], 0
        self._owners.pop(sequence, None)

    def _waves(self, sequences: Sequence[CachedSequence]) -> Iterator[list[CachedSequence]]:
        """Split a step into batches that fit into the pool. Short ones first: one batch for all that
        decode.
        """
        waiting = sorted(sequences, key=_shape, reverse=True)
        while waiting:
            wave: list[CachedSequence] = []
            while waiting and self._reserve(waiting[-1], wave):
                wave.append(waiting.pop())
            yield wave

    def _reserve(self, sequence: CachedSequence, wave: list[CachedSequence]) -> bool:
        """Give `sequence` the blocks for its tokens, taken from the longest idle where none are free.

        Returns:
            False where only the sequences of `wave` hold blocks; never for an empty wave, since the pool has
            room for one whole context.
        """
        count = blocks_for(len(sequence.tokens))
        self.pool.give(sequence.blocks[count:])
        del sequence.blocks[count:]
        missing = count - len(sequence.blocks)
        if self.pool.free < missing and not self._evict(missing, {*wave, sequence}):
            return False
        if missing:
            taken = self.pool.take(missing)
            self._cache.clear(slots_of(torch.tensor(taken, device=self.device)))
            sequence.blocks += taken
        self._owners.pop(sequence, None)
        self._owners[sequence] = None
        return True

    def _evict(self, wanted: int, busy: set[CachedSequence]) -> bool:
        """Take blocks from sequences that are not `busy` until `wanted` are free; False where that fails."""
        for owner in [owner for owner in self._owners if owner not in busy]:
            self.release(owner)
            if self.pool.free >= wanted:
                return True
        return False

    def _layout(self, wave: Sequence[CachedSequence]) -> tuple[Step, Tensor, Tensor, Tensor]:
        """Lay a batch out flat, in the wave's order.

        Returns:
            The step, and int64 tensors: the new tokens [n], their positions [n], where each sequence ends
            [sequences].
        """
        groups, start = [], 0
        for (count, _), members in groupby(wave, key=_shape):
            groups.append(self._group(list(members), count, start))
            start += groups[-1].index.numel()
        tokens = [token for sequence in wave for token in sequence.tokens[sequence.cached :]]
        positions = torch.cat([group.positions.flatten() for group in groups])
        slots = torch.cat([group.slots.gather(1, group.positions).flatten() for group in groups])
        last = torch.cat([group.index[:, -1] for group in groups])
        step = Step(self._cache, slots, groups)
        return step, torch.tensor(tokens, device=self.device), positions, last

    def _group(self, members: Sequence[CachedSequence], count: int, start: int) -> Group:
        """The group of `members`, each with `count` new tokens, that stands at `start` of the flat batch."""
        width = max(len(sequence.blocks) for sequence in members)
        # padded with what is the sequence's own: nothing that another has computed can reach it
        table = [seq.blocks + seq.blocks[-1:] * (width - len(seq.blocks)) for seq in members]
        first = torch.tensor([sequence.cached for sequence in members], device=self.device)
        index = torch.arange(start, start + len(members) * count, device=self.device)
        return Group(
            index=index.view(len(members), count),
            positions=first[:, None] + torch.arange(count, device=self.device),
            slots=slots_of(torch.tensor(table, device=self.device)),
        )


def _shape(sequence: CachedSequence) -> tuple[int, int]:
    """Which sequences are attended in one call: as many new tokens, and contexts of like length.

    A call pads to its longest context, so that less than half of what it attends to is padding.
    """
    return sequence.new_tokens, blocks_for(len(sequence.tokens)).bit_length()


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two rows are the same but for rounding."""
    return left is not None and right is not None and torch.allclose(left, right, atol=1e-2, rtol=1e-2)
