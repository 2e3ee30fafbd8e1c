"""The control runtime for engines that sample on the device: by slot, in mode `segments`, and without a host
read of what was sampled. It knows nothing of vLLM.

The host lays a step out from upper bounds: of how long each context is, and of how much of it is new. What is
really there, the device masks. The host waits for the device only where a request joins whose context it
can't know the length of (the target's prompt, or output from before a preemption), and where a context comes
to the end of its control's window.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab_processors import metrics
from trimtab_processors.attention import Group, KeyValues, Step, slots_of
from trimtab_processors.cache import BLOCK_SIZE, BlockPool, blocks_for
from trimtab_processors.control import Control, Target
from trimtab_processors.divergence import Sample, kl_divergence
from trimtab_processors.model import ControlModel
from trimtab_processors.pack import ONLY_V2_ROUTINGS, PATH, V2_ROUTINGS, PackError
from trimtab_processors.parameters import SEVERAL
from trimtab_processors.routing.base import Lookahead
from trimtab_processors.routing.shift import within_guards
from trimtab_processors.segments import LAG, Contexts, History, Join, Late, Segments, upload
from trimtab_processors.settings import DEFAULT_CACHE_BYTES, DEFAULT_KL_EVERY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trimtab_processors.parameters import Parameters

logger = logging.getLogger(__name__)

MOST_TOKENS = 8192
"""New tokens that one forward pass computes, where it has more than one context."""
MOST_ATTENDED = 2**17
"""Slots of contexts whose keys and values are gathered at once: what bounds the memory of a step."""
MAX_AHEAD = 1024
"""Slots for what is looked ahead at, which no context keeps."""
_NEVER = 2**62
_PATH = V2_ROUTINGS.index(PATH)
_PADDING, _SCRATCH = 0, 1
"""Blocks of no context: the one pads block tables and stays 0; into the other go the keys and values of
padding tokens, which may be NaN, so that no table has it.
"""
_RESERVED = 2


@dataclass(frozen=True)
class Batch:
    """A step of the engine: its requests, and the rows of its logits."""

    slots: NDArray[np.int64]
    """[requests]: their slots."""
    row_slots: Tensor
    """int [rows]: to which slot each row belongs."""
    row_offsets: Tensor
    """int [rows]: its place among the rows of its request: 0 after what was sampled, j after draft j."""
    row_tokens: Tensor
    """int [rows]: the token that the row follows on."""
    row_lengths: Tensor
    """int64 [rows]: the number of tokens that the row follows on, drafts included."""


class Rows(NamedTuple):
    """A control's logits for n slots: one row after each slot's context, and one after each of its drafts."""

    slots: NDArray[np.int64]
    """[n]."""
    places: Tensor
    """int64 [n]: the slots on the device."""
    known: Tensor
    """bool [n]: whether there is a context at all."""
    logits: Tensor
    """float32 [n, 1 + drafts, control vocabulary]."""
    lookahead: Lookahead | None
    """Of each row; None if no slot looks ahead. Its tensors are [n, 1 + drafts, ...]."""
    ahead: Tensor | None
    """float32 [n, 1 + drafts, control vocabulary]: the logits after it."""

    @staticmethod
    def joined(waves: Sequence[Rows]) -> Rows:
        """Return the rows of all `waves` in one. Either all waves look ahead, or none."""
        if len(waves) == 1:
            return waves[0]
        slots, places, known, logits, lookaheads, aheads = zip(*waves, strict=True)
        lookahead = ahead = None
        if lookaheads[0] is not None:
            lookahead = Lookahead(*map(torch.cat, zip(*lookaheads, strict=True)))
            ahead = torch.cat(aheads)
        columns = (torch.cat(places), torch.cat(known), torch.cat(logits))
        return Rows(np.concatenate(slots), *columns, lookahead, ahead)

    def looked_ahead(self, pick: Tensor, offset: Tensor) -> tuple[Lookahead | None, Tensor | None]:
        """Return the lookahead of some rows, and the logits after it."""
        if self.lookahead is None or self.ahead is None:
            return None, None
        return Lookahead(*(tensor[pick, offset] for tensor in self.lookahead)), self.ahead[pick, offset]


class Blocks:
    """Which blocks of a pool hold the keys and values of each slot."""

    def __init__(self, slots: int, blocks: int, width: int) -> None:
        """Share `blocks` blocks, beside those for padding, among `slots` contexts of up to `width` blocks."""
        self.pool = BlockPool(blocks + _RESERVED)
        self.pool.take(_RESERVED)
        self.table = np.full((slots, width), _PADDING, dtype=np.int64)
        self._held = np.zeros(slots, dtype=np.int64)
        self._owners: dict[int, None] = {}
        """The slots that hold blocks, the one that has not run for longest first."""
        self.empty = np.ones(slots, dtype=np.bool_)
        """Of which slots nothing is computed."""
        self.taken: list[int] = []
        """The blocks that were taken since somebody last cleared them."""

    def release(self, slot: int) -> None:
        """Take the slot's blocks; what was computed of it is lost."""
        self.pool.give(self.table[slot, : self._held[slot]].tolist())
        self.table[slot], self._held[slot], self.empty[slot] = _PADDING, 0, True
        self._owners.pop(slot, None)

    def held_by(self, slots: NDArray[np.int64]) -> int:
        """How many blocks `slots`, int64 [n], hold."""
        return int(self._held[slots].sum())

    def reserve(self, slot: int, count: int, wave: Sequence[int]) -> bool:
        """Give `slot` its first `count` blocks, taken from the longest idle where none are free.

        Returns:
            False where only the slots of `wave` hold blocks.
        """
        missing = max(count - int(self._held[slot]), 0)
        if self.pool.free < missing and not self._evict(missing, {*wave, slot}):
            return False
        start = self._held[slot]
        taken = self.pool.take(missing)
        self.taken += taken
        self.table[slot, start : start + missing] = taken
        self._held[slot] += missing
        self._owners.pop(slot, None)
        self._owners[slot] = None
        return True

    def _evict(self, wanted: int, busy: set[int]) -> bool:
        for owner in [owner for owner in self._owners if owner not in busy]:
            self.release(owner)
            if self.pool.free >= wanted:
                return True
        return False


class DeviceControl:
    """One control beside one target: its contexts, its keys and values, and the rows that it computes."""

    def __init__(self, control: Control, target: Target, history: History, *, most_drafts: int) -> None:
        """Prepare a context for each slot of `history`.

        Args:
            control: the control.
            target: the model that it steers.
            history: what the target has read and written.
            most_drafts: the draft tokens that a request may have in a step.

        Raises:
            PackError: the control's tokenizer spells with tokens that its model does not have.
        """
        self.control = control
        self._device, self._history = target.device, history
        self._labels = (target.name, control.name)
        self._routings = [control.routings[name] for name in V2_ROUTINGS]
        self._path = control.routings[PATH]
        slots = len(history.length)
        self._window = window = control.max_context - self._path.longest
        """The maximum length of a context: behind it there is room to look ahead."""
        if (highest := int(control.table.segment_ids.max(initial=-1))) >= control.vocab_size:
            raise PackError(
                f"control {control.name!r}: its tokenizer spells with token {highest}, but its model has only"
                f" {control.vocab_size}"
            )
        segments = Segments(control.table, target.vocabulary, target.device)
        self._longest = segments.longest
        self._counts = torch.zeros(4, dtype=torch.int64, device=target.device)
        """Rows that were shifted, and rows left alone since their shift was not finite; tokens of text that
        were taken in, and those of them that the control has as they are.
        """
        self._late_counts, self._counted = Late(self._counts), np.zeros(4, dtype=np.int64)
        self.contexts = Contexts(
            segments, history, window=window, most_new=1 + most_drafts, tally=self._counts[2:]
        )
        blocks = min(part.model.pool.blocks for part in control.parts)
        self.blocks = Blocks(slots, blocks, blocks_for(window))
        ahead = min(slots * (1 + most_drafts) * self._path.longest, MAX_AHEAD)
        ahead = blocks_for(max(ahead, (1 + most_drafts) * self._path.longest))
        self._caches = [part.model.key_values(blocks + _RESERVED + ahead) for part in control.parts]
        self._ahead_slots = torch.arange(ahead * BLOCK_SIZE, device=target.device)
        """The slots behind the pool's, for keys and values of what is looked ahead at."""
        self._ahead_slots += (blocks + _RESERVED) * BLOCK_SIZE
        self._computed = torch.zeros(slots, dtype=torch.int64, device=target.device)
        """Keys and values of so many tokens stand in the blocks, where those are not `empty`."""
        self._pending = np.zeros(slots, dtype=np.int64)
        """Upper bound on the growth of each context since it was computed."""
        self._strengths = torch.zeros(slots, dtype=torch.float32, device=target.device)
        self._top_k, self._top_ks = np.zeros(slots, dtype=np.int64), torch.zeros_like(self._computed)
        """How many of the target's likeliest tokens are shifted, on the host and on the device; 0: all."""
        self._min_p, self._min_ps = np.zeros(slots), torch.zeros_like(self._strengths)
        self._routing, self._routing_ids = np.zeros(slots, dtype=np.int64), torch.zeros_like(self._computed)
        """The place of each slot's routing in `V2_ROUTINGS`, on the host and on the device."""
        self._ends = torch.full_like(self._computed, _NEVER)
        """The length of the history at which the control lets go."""
        self._over = torch.zeros(slots, dtype=torch.bool, device=target.device)
        self._late_over = Late(self._over)
        self._until, self._age = np.zeros(slots, dtype=np.bool_), np.zeros(slots, dtype=np.int64)
        """Whether each slot has such an end, and the number of steps since it was opened."""
        self.members = np.zeros(slots, dtype=np.bool_)
        """Which slots are under this control."""
        self._joining: dict[int, Join] = {}
        self._recent: list[NDArray[np.int64]] = []
        self._ahead: Rows | None = None
        self._served = np.zeros(0, dtype=np.int64)
        """The slots of the last step: of a request that ended, nobody tells."""

    @property
    def capacity(self) -> int:
        """The blocks that contexts may have."""
        return self.blocks.pool.blocks - _RESERVED

    def open(self, slot: int, parameters: Parameters, prompt: int, end: int) -> None:
        """Take up a request in `slot`, which was closed before.

        Args:
            slot: where it is.
            parameters: what it wants.
            prompt: how many tokens the target's prompt has.
            end: how many its history has.
        """
        vocab_size, own = self.control.vocab_size, parameters.prompt
        usable = own is not None and all(token < vocab_size for token in own)
        tokens = self.control.prompt((), own)
        start, keeps_first = prompt if usable else 0, self.control.keeps_first(tokens)
        self._joining[slot] = Join(slot, tokens, start, end, prompt, keeps_first=keeps_first)
        self._strengths[slot] = self.control.strength_of(parameters)
        self._top_k[slot] = self._top_ks[slot] = parameters.top_k or 0
        self._min_p[slot] = self._min_ps[slot] = parameters.min_p or 0.0
        routing = V2_ROUTINGS.index(parameters.routing or self.control.default_routing)
        self._routing[slot] = self._routing_ids[slot] = routing
        self._ends[slot] = _NEVER if parameters.until is None else prompt + parameters.until
        self._until[slot], self._age[slot] = parameters.until is not None, 0
        self.members[slot] = True
        metrics.REQUESTS.labels(*self._labels).inc(end == prompt)

    def close(self, slot: int) -> None:
        """Give back what the slot holds."""
        self._joining.pop(slot, None)
        self.members[slot] = False
        self._until[slot] = False
        self._top_k[slot] = self._min_p[slot] = 0
        self._recent = [slots[slots != slot] for slots in self._recent]
        self.blocks.release(slot)

    def begin(self) -> None:
        """Take in who joined, and compute the rows that the next step will most likely want."""
        self.contexts.refresh()
        self._count()
        self._let_go()
        if self._joining:
            cut = self.contexts.join([*self._joining.values()])
            metrics.TRUNCATIONS.labels(*self._labels).inc(len(cut))
        slots = np.concatenate((np.array([*self._joining], dtype=np.int64), *self._recent))
        self._joining.clear()
        self._recent.clear()
        self._ahead = self.rows(slots) if slots.size else None

    def _let_go(self) -> None:
        """Close the slots whose control has let go, some steps late: until then their rows are masked."""
        if not self._until.any():
            return
        self._age += 1
        torch.ge(self._history.length, self._ends, out=self._over)
        over = self._late_over.exchange() & self._until & (self._age > LAG + 1)
        for slot in np.flatnonzero(over).tolist():
            self.close(slot)

    def _count(self) -> None:
        counts = np.maximum(self._late_counts.exchange(), self._counted)
        counted = (metrics.TOKENS, metrics.NON_FINITE, metrics.ALIGNED, metrics.EXACT)
        for metric, more in zip(counted, (counts - self._counted).tolist(), strict=True):
            metric.labels(*self._labels).inc(more)
        self._counted = counts
        metrics.BLOCKS.labels(*self._labels).set(self.blocks.held_by(self._served))
        self._served = self._served[:0]

    def rows(self, slots: NDArray[np.int64], drafts: Tensor | None = None) -> Rows:
        """Compute the rows of `slots`, after what they have and after each of their drafts.

        Args:
            slots: int64 [n], no slot twice.
            drafts: int64 [all slots, drafts], target tokens, -1 for none. They leave no trace.

        Returns:
            The rows, in an order of their own.
        """
        places = upload(slots, self._device)
        self._pending[slots] += self.contexts.advance(slots, places)
        extra = self._longest * (drafts.shape[1] if drafts is not None else 0)
        cut = self.contexts.fit(slots, places, extra)
        metrics.TRUNCATIONS.labels(*self._labels).inc(len(cut))
        for slot in cut:
            self.blocks.release(slot)
        looks = bool(self._path.longest) and bool((self._routing[slots] == _PATH).any())
        return Rows.joined(
            [self._run(wave, drafts, extra, looks=looks) for wave in self._waves(slots, extra)]
        )

    def _shape(self, slot: int, extra: int) -> tuple[int, int]:
        """Return upper bounds on the number of new tokens of `slot`, and of blocks of its context."""
        length = max(int(self.contexts.bound[slot]), 1)
        new = length if self.blocks.empty[slot] else max(int(self._pending[slot]), 1)
        return min(new + extra, self._window), blocks_for(min(length + extra, self._window))

    def _waves(self, slots: NDArray[np.int64], extra: int) -> Iterator[list[int]]:
        """Split a step into batches that fit into the pool and into memory, contexts of like shape side by
        side.
        """
        waiting = sorted(slots.tolist(), key=lambda slot: self._likeness(slot, extra), reverse=True)
        while waiting:
            wave = [waiting.pop()]
            tokens, blocks = self._shape(wave[0], extra)
            self.blocks.reserve(wave[0], blocks, wave)
            while waiting:
                new, blocks = self._shape(waiting[-1], extra)
                tokens += new
                if tokens > MOST_TOKENS or not self.blocks.reserve(waiting[-1], blocks, wave):
                    break
                wave.append(waiting.pop())
            yield wave

    def _likeness(self, slot: int, extra: int) -> tuple[int, int]:
        """Which slots are attended together: padding is less than half of what they have and see."""
        new, blocks = self._shape(slot, extra)
        return new.bit_length(), blocks.bit_length()

    def _run(self, wave: list[int], drafts: Tensor | None, extra: int, *, looks: bool) -> Rows:
        self._clear_taken()
        slots = np.array(wave, dtype=np.int64)
        places, empty = upload(np.stack((slots, self.blocks.empty[slots])), self._device)
        length = self.contexts.length[places]
        ends = length[:, None] if drafts is None else self.contexts.ends(places, drafts[places])
        # The last token is computed even where it is cached: its row is wanted.
        first = torch.where(empty > 0, 0, torch.minimum(self._computed[places], length - 1)).clamp(min=0)
        batch, start = _FlatBatch(self._device), 0
        for members, new, blocks in self._groups(wave, extra):
            part = slice(start, start := start + len(members))
            positions = first[part, None] + torch.arange(new, device=self._device)
            # what is past the end is not real, and may be past the tensor
            columns = positions.clamp(max=self.contexts.tokens.shape[1] - 1)
            batch.add(
                self.contexts.tokens[places[part, None], columns],
                positions,
                slots_of(upload(self.blocks.table[members, :blocks], self._device)),
                positions < ends[part, -1:],
                (ends[part] - 1 - first[part, None]).clamp(0, new - 1),
            )
        logits = self._logits(batch).view(*ends.shape, -1)
        self._computed[places] = length
        self._pending[slots], self.blocks.empty[slots] = 0, False
        looked = self._look_ahead(wave, places, ends, logits, extra) if looks else (None, None)
        return Rows(slots, places, length > 0, logits, *looked)

    def _logits(self, batch: _FlatBatch) -> Tensor:
        """Return float32 [wanted, control vocabulary], the weighted sum over the control's models."""
        logits = [
            part.weight * batch.run(part.model, cache)[:, : self.control.vocab_size]
            for part, cache in zip(self.control.parts, self._caches, strict=True)
        ]
        return torch.stack(logits).sum(dim=0)

    def _look_ahead(
        self, wave: list[int], places: Tensor, ends: Tensor, logits: Tensor, extra: int
    ) -> tuple[Lookahead, Tensor]:
        """Compute the rows after the continuations that path routing wants, of the slots that have it.

        A row's continuation attends to its context, and is written where no context keeps it.

        Args:
            wave: n slots, whose contexts are in their blocks.
            places: int64 [n], the same on the device.
            ends: int64 [n, rows], behind which tokens of the context each row is.
            logits: float32 [n, rows, control vocabulary].
            extra: see `rows`.
        """
        chosen = self._path.lookahead(logits.flatten(0, 1))
        assert chosen is not None  # a routing with a `longest`  # noqa: S101
        nodes, tokens, lengths = (tensor.view(*ends.shape, *tensor.shape[1:]) for tensor in chosen)
        looks = (self._routing_ids[places] == _PATH)[:, None] & (ends > 0)
        lengths = torch.where(looks, lengths, 0)
        rows, steps = ends.shape[1], torch.arange(self._path.longest, device=self._device)
        own = self._ahead_slots
        batch, ahead, start = _FlatBatch(self._device), [], 0
        for members, _, blocks in self._groups(wave, extra, rows, len(steps)):
            if batch.size + len(members) * rows * len(steps) > len(own):
                ahead.append(self._ahead_logits(batch))
                batch = _FlatBatch(self._device)
            part = slice(start, start := start + len(members))
            end = ends[part].reshape(-1, 1)
            context = slots_of(upload(self.blocks.table[members, :blocks], self._device))
            columns = torch.arange(context.shape[1] + len(steps), device=self._device)
            past = (columns - end).clamp(0, len(steps) - 1)
            mine = own[batch.size : batch.size + end.numel() * len(steps)].view(-1, len(steps))
            shared = context.repeat_interleave(rows, dim=0, output_size=len(end))
            shared = torch.cat((shared, mine), dim=1)  # as wide as `columns`; never read past the end
            length = lengths[part].reshape(-1, 1)
            batch.add(
                tokens[part].reshape(-1, len(steps)),
                end + steps,
                torch.where(columns < end, shared, mine.gather(1, past)),
                steps < length,
                (length - 1).clamp(min=0),
            )
        ahead.append(self._ahead_logits(batch))
        return Lookahead(nodes, tokens, lengths), torch.cat(ahead).view(*ends.shape, -1)

    def _ahead_logits(self, batch: _FlatBatch) -> Tensor:
        for cache in self._caches:
            cache.clear(self._ahead_slots[: batch.size])
        return self._logits(batch)

    def _clear_taken(self) -> None:
        if self.blocks.taken:
            slots = slots_of(upload(np.array(self.blocks.taken, dtype=np.int64), self._device))
            self.blocks.taken.clear()
            for cache in self._caches:
                cache.clear(slots)

    def _groups(
        self, wave: list[int], extra: int, rows: int = 1, ahead: int = 0
    ) -> Iterator[tuple[list[int], int, int]]:
        """Split `wave` into slots that are attended together, with upper bounds on new tokens and blocks.

        With several `rows`, each slot is attended that often; with `ahead` tokens to look ahead at in each,
        a group has room among the slots for those.
        """
        for _, like in groupby(wave, key=lambda slot: self._likeness(slot, extra)):
            members = [*like]
            new, blocks = map(max, zip(*(self._shape(slot, extra) for slot in members), strict=True))
            most = MOST_ATTENDED // (blocks * BLOCK_SIZE * rows)
            if ahead:
                most = min(most, len(self._ahead_slots) // (rows * ahead))
            most = max(most, 1)
            for start in range(0, len(members), most):
                yield members[start : start + most], new, blocks

    def guards(self, slots: NDArray[np.int64]) -> bool:
        """Whether only tokens that the target finds likely are shifted for some of `slots`."""
        return bool((self.members & ((self._top_k > 0) | (self._min_p > 0)))[slots].any())

    def needs_own(self, slots: NDArray[np.int64]) -> bool:
        """Whether the shift of some of `slots` depends on the target's own logits."""
        looks = bool(self._path.longest) and bool((self.members & (self._routing == _PATH))[slots].any())
        return looks or self.guards(slots)

    def apply(self, logits: Tensor, own: Tensor, batch: Batch, drafts: Tensor | None) -> None:
        """Shift the rows of the requests under this control in place.

        Args:
            logits: float [rows, width].
            own: float [rows, width], the target's own logits; they may be `logits`.
            batch: the step.
            drafts: see `rows`; without, each request has one row.
        """
        members = np.flatnonzero(self.members[batch.slots])
        slots = self._served = batch.slots[members]
        if drafts is None:
            self._apply_single(logits, own, batch, members)
            self._recent.append(slots)  # with drafts, what could be computed ahead is not worth a pass
        else:
            self._apply_drafts(logits, own, batch, self.rows(slots, drafts))
        self.contexts.expect(slots, 1 + (drafts.shape[1] if drafts is not None else 0))

    def _apply_single(self, logits: Tensor, own: Tensor, batch: Batch, members: NDArray[np.int64]) -> None:
        slots = batch.slots[members]
        row_of = np.full(len(self._pending), -1)
        row_of[slots] = members
        ahead = self._ahead
        ready = slots[np.isin(slots, ahead.slots) & ~self.contexts.arrives(slots)] if ahead else slots[:0]
        late = np.setdiff1d(slots, ready)
        for rows in (ahead if ready.size else None, self.rows(late) if late.size else None):
            if rows:
                picked = np.flatnonzero(np.isin(rows.slots, ready if rows is ahead else late))
                pick, row = upload(np.stack((picked, row_of[rows.slots[picked]])), self._device)
                shift = self._shift(rows, pick, own, batch, row, slots=rows.slots[picked])
                logits.index_add_(0, row, shift.to(logits.dtype))

    def _apply_drafts(self, logits: Tensor, own: Tensor, batch: Batch, rows: Rows) -> None:
        place_of = torch.full((len(self._pending),), -1, device=self._device)
        place_of[rows.places] = torch.arange(len(rows.slots), device=self._device)
        owner = place_of[batch.row_slots.long()]
        every = torch.arange(len(logits), device=self._device)
        shift = self._shift(rows, owner.clamp(min=0), own, batch, every, slots=rows.slots)
        shift = torch.where(owner[:, None] >= 0, shift, 0.0)
        logits.add_(shift.to(logits.dtype))

    def _shift(
        self, rows: Rows, pick: Tensor, own: Tensor, batch: Batch, index: Tensor, *, slots: NDArray[np.int64]
    ) -> Tensor:
        """Return the shift of n rows: 0 if there is no context, it is not finite, or the control has let go.

        Args:
            rows: what was computed.
            pick: int64 [n], the place of each row's slot in it.
            own: float [rows of the step, width], the target's own logits.
            batch: the step.
            index: int64 [n], which of its rows are shifted.
            slots: all slots of these rows, on the host.

        Returns:
            float32 [n, width].
        """
        places, offset, length = rows.places[pick], batch.row_offsets[index].long(), batch.row_lengths[index]
        first, *others = np.unique(self._routing[slots]).tolist()
        shift, finite = self._routed(first, rows, pick=pick, offset=offset, own=own, index=index)
        for number in others:
            has_it = self._routing_ids[places] == number
            values, ok = self._routed(number, rows, pick=pick, offset=offset, own=own, index=index)
            shift, finite = torch.where(has_it[:, None], values, shift), torch.where(has_it, ok, finite)
        if self.guards(slots):
            largest = int(self._top_k[slots].max())
            guards = self._top_ks[places], self._min_ps[places], largest
            shift = within_guards(own[index], shift, *guards)
        known = rows.known[pick] & (length < self._ends[places])
        # of a prompt that is half read, the row is not sampled from
        counts = known & (length - offset >= self._history.length[places])
        self._counts[:2] += torch.stack(((counts & finite).sum(), (counts & ~finite).sum()))
        return torch.where((known & finite)[:, None], shift, 0.0)

    def _routed(
        self, number: int, rows: Rows, *, pick: Tensor, offset: Tensor, own: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the shift of n rows by one of `V2_ROUTINGS`, and which of them are finite; see `_shift`."""
        strengths = self._strengths[rows.places[pick]]
        looked_ahead = rows.looked_ahead(pick, offset)
        shift = self._routings[number].shift(rows.logits[pick, offset], strengths, *looked_ahead)
        return shift.resolve(own, index), shift.finite


class _FlatBatch:
    """The flat batch of one forward pass, which grows by groups of contexts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.size = 0
        """Its tokens, those included that are not real."""
        self._groups: list[Group] = []
        self._tokens: list[Tensor] = []
        self._writes: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def add(self, tokens: Tensor, positions: Tensor, slots: Tensor, real: Tensor, wanted: Tensor) -> None:
        """Add m contexts with up to `new` new tokens each.

        Args:
            tokens: int [m, new].
            positions: int64 [m, new], their positions in their contexts.
            slots: int64 [m, context], where each context's keys and values are.
            real: bool [m, new], false for padding: it is written to no context, and nothing attends to it.
            wanted: int64 [m, rows], after which of the new tokens rows are wanted.
        """
        positions = torch.where(real, positions, 0)
        index = torch.arange(self.size, self.size + real.numel(), device=self._device).view_as(real)
        self._groups.append(Group(index, positions, slots))
        self._tokens.append(torch.where(real, tokens, 0).flatten().long())
        self._writes.append(torch.where(real, slots.gather(1, positions), _SCRATCH * BLOCK_SIZE).flatten())
        self._wanted.append(index.gather(1, wanted).flatten())
        self.size += real.numel()

    def run(self, model: ControlModel, cache: KeyValues) -> Tensor:
        """Return float32 [wanted, vocabulary]."""
        positions = torch.cat([group.positions.flatten() for group in self._groups])
        step = Step(cache, torch.cat(self._writes), self._groups)
        return model.forward(step, torch.cat(self._tokens), positions, torch.cat(self._wanted))


class DeviceRuntime:
    """The controls of one engine, and what they compute in a step."""

    def __init__(
        self,
        target: Target,
        controls: Mapping[str, str],
        history: History,
        *,
        tables: Path,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        neutral: bool = True,
        routing: str | None = None,
        most_drafts: int = 0,
        kl_every: int = DEFAULT_KL_EVERY,
    ) -> None:
        """Load every control of `controls`, name to pack, beside `target`.

        Args:
            target: the model that is steered.
            controls: names and where their packs are.
            history: what the target has read and written, by slot.
            tables: the directory of mapping tables.
            cache_bytes: the size of each control's pool of keys and values, in bytes.
            neutral: how unmapped tokens are shifted, see `Pair`.
            routing: the name of the one for requests that do not say; None: as each pack says.
            most_drafts: the draft tokens that a request may have in a step.
            kl_every: on one step of so many it is measured how far control moves the target; 0: on none.
        """
        self._target, self._history, self._most_drafts = target, history, most_drafts
        self._make = partial(
            Control,
            target=target,
            tables=tables,
            cache_bytes=cache_bytes,
            neutral=neutral,
            routing=routing,
            routings=V2_ROUTINGS,
            waits=False,
        )
        self._controls: dict[str, DeviceControl] = {}
        for name, location in controls.items():
            self.install(self.load(name, location))
        self._lane = _Lane(target.device)
        self._sample, self._divergence = Sample(kl_every), _Divergence(target.name, target.device)
        self._began = self._blocked = 0.0
        self._begins = True
        """Whether nothing of the step has been counted."""

    @property
    def controls(self) -> Sequence[Control]:
        """Those that a request may name."""
        return [each.control for each in self._controls.values()]

    def load(self, name: str, location: str) -> DeviceControl:
        """Make a control ready, in whatever thread; nobody has it before `install`.

        Raises:
            PackError, VocabularyError: the pack can't be used; the message names it and the reason.
        """
        control = self._make(name, location)
        if control.default_routing not in V2_ROUTINGS:
            raise PackError(f"control {name!r}: routing {control.default_routing!r}: {ONLY_V2_ROUTINGS}")
        return DeviceControl(control, self._target, self._history, most_drafts=self._most_drafts)

    def install(self, control: DeviceControl) -> None:
        """Let requests name `control`, between two steps."""
        self._controls[control.control.name] = control
        metrics.announce(self._target.name, control.control.name, control.capacity)

    def unload(self, name: str) -> None:
        """Let no request name a control, between two steps. Those that still have it go on without: which
        they are, nobody tells this runtime.
        """
        self._controls.pop(name, None)
        metrics.withdraw(self._target.name, name)

    def open(self, slot: int, parameters: Sequence[Parameters], prompt: int, end: int) -> bool:
        """Take up the request in `slot`, anew or resumed; whatever was in the slot before is forgotten.

        Args:
            slot: where it is.
            parameters: the controls that it wants, whose shifts are summed.
            prompt: how many tokens the target's prompt has.
            end: how many its history has: more than that, where it is resumed.

        Returns:
            Whether it is under any control; it goes on without those that this engine does not have, and
            without those at strength 0.
        """
        for control in self._controls.values():
            if control.members[slot]:
                control.close(slot)
        wanted = [each for each in parameters if self._steers(each)]
        for each in wanted:
            self._controls[each.control].open(slot, each, prompt, end)
        return bool(wanted)

    def _steers(self, parameters: Parameters) -> bool:
        if parameters.control not in self._controls:
            logger.error("no control %r here, a request goes on without it", parameters.control)
            metrics.UNKNOWN.labels(self._target.name).inc()
            return False
        return bool(self._controls[parameters.control].control.strength_of(parameters))

    @torch.inference_mode()
    def begin(self) -> None:
        """Begin a step, once the history holds what the last one sampled: compute beside the target's
        forward what the step will most likely want.
        """
        self._began, self._begins = time.perf_counter(), True
        self._divergence.count()
        with self._lane.beside():
            for control in self._controls.values():
                control.begin()
        self._blocked = time.perf_counter() - self._began

    @torch.inference_mode()
    def apply(self, logits: Tensor, batch: Batch) -> None:
        """Shift `logits`, float [rows, width], in place; for a step, or for each part of its requests."""
        started = time.perf_counter()
        self._lane.join()
        active = [control for control in self._controls.values() if control.members[batch.slots].any()]
        if active:
            self._shift(logits, batch, active)
            self._count_step(started)

    def _shift(self, logits: Tensor, batch: Batch, active: Sequence[DeviceControl]) -> None:
        drafts = self._drafts(batch)
        controls = np.sum([control.members[batch.slots] for control in active], axis=0)
        # of a row that several controls shift, each sees the target's own logits
        several = controls.max() > 1 and any(control.needs_own(batch.slots) for control in active)
        own = logits.clone() if several else logits
        with self._measuring(logits, batch, active):
            for control in active:
                control.apply(logits, own, batch, drafts)

    def _count_step(self, started: float) -> None:
        """Count the step, or a further part of it, of which `apply` has taken the time since `started`."""
        now = time.perf_counter()
        blocked = self._blocked + now - started
        metrics.count_step(self._target.name, seconds=now - self._began, blocked=blocked, begins=self._begins)
        self._began, self._blocked, self._begins = now, 0.0, False

    @contextmanager
    def _measuring(self, logits: Tensor, batch: Batch, active: Sequence[DeviceControl]) -> Iterator[None]:
        """Measure, in a sampled step, how far what happens within moves the first row of one request."""
        steered = batch.slots[np.logical_or.reduce([control.members[batch.slots] for control in active])]
        place = self._sample.pick(len(steered))
        if place is None:
            yield
            return
        slot = steered[place]
        row = ((batch.row_slots == slot) & (batch.row_offsets == 0)).int().argmax(dim=0, keepdim=True)
        own = logits[row][0]
        yield
        names = [control.control.name for control in active if control.members[slot]]
        nats = kl_divergence(logits[row][0], own)
        self._divergence.put(nats, names[0] if len(names) == 1 else SEVERAL)

    def _drafts(self, batch: Batch) -> Tensor | None:
        """int64 [slots, drafts]: the drafts of this step, -1 for none; None where nobody has any."""
        most = min(len(batch.row_slots) - len(batch.slots), self._most_drafts)
        if not most:
            return None
        drafts = torch.full((len(self._history.length), 1 + most), -1, device=self._target.device)
        drafts[batch.row_slots.long(), batch.row_offsets.long()] = batch.row_tokens.long()
        return drafts[:, 1:]


class _Divergence:
    """How far control moved a row, counted `LAG` steps later: the host does not wait for it."""

    def __init__(self, model_name: str, device: torch.device) -> None:
        self._model_name = model_name
        self._nats = torch.zeros(1, device=device)
        self._late = Late(self._nats)
        self._due: deque[str | None] = deque([None] * LAG)
        """For which control each of the late copies is counted; None: it holds nothing new."""
        self._fresh: str | None = None

    def put(self, nats: Tensor, control: str) -> None:
        """Take float32 [] of this step."""
        self._nats[0], self._fresh = nats, control

    def count(self) -> None:
        """Once a step: count what was measured `LAG` steps ago."""
        if self._fresh is None and not any(self._due):
            return
        control, (nats,) = self._due.popleft(), self._late.exchange().tolist()
        if control is not None:
            metrics.observe_divergence(self._model_name, control, nats)
        self._due.append(self._fresh)
        self._fresh = None


class _Lane:
    """A stream beside that of the target's forward, where the device has streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work that begins after what the current stream has been given so far.

        What is allocated here is used by the current stream only before the next call, and the other way
        round never: so memory that is freed is not taken while the other stream still reads it.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the work beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
