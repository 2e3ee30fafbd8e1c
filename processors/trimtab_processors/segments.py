"""Alignment in mode `segments`: a target token is appended to the control's context as its bytes spelled in
control tokens, which a mapping table has ready. No tokenizer, and nothing that the host has to read.

Contexts live on the device, one row for each slot of the engine. The host knows an upper bound of each one's
length, which is enough to lay out a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimtab_processors.alignment import dropped_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trimtab_mappings import MappingTable, Vocabulary

LAG = 2
"""How many steps old what `Late` gives is: the host is never further ahead of the device than that."""
_UNKNOWN = 2**40


def upload(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """int64 `values` on the device; the host goes on at once. The caller does not write to them again."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Late:
    """The values that a tensor of the device had `LAG` steps ago, for which the host needn't wait.

    Always so old, not as young as may be: every rank of an engine has to lay out the same step.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        on_gpu = source.device.type == "cuda"
        self._copies = [torch.zeros(source.shape, dtype=source.dtype, pin_memory=on_gpu) for _ in range(LAG)]
        self._arrays = [copy.numpy() for copy in self._copies]
        self._events = [torch.cuda.Event() if on_gpu else None for _ in range(LAG)]  # type: ignore[no-untyped-call]
        self.turn = 0
        """Which of the copies is the next to be given."""

    def exchange(self) -> NDArray[Any]:
        """Give the oldest copy, zeros at first, and begin a new one in its place."""
        event = self._events[self.turn]
        if event:
            event.synchronize()
        values: NDArray[Any] = self._arrays[self.turn].copy()
        self._copies[self.turn].copy_(self._source, non_blocking=True)
        if event:
            event.record()
        self.turn = (self.turn + 1) % LAG
        return values


class Segments:
    """Each target token's bytes in control tokens, on the device; ids that the target lacks have none."""

    def __init__(self, table: MappingTable, target: Vocabulary, device: torch.device) -> None:
        offsets = table.segment_offsets.astype(np.int64)
        lengths = np.append(np.diff(offsets), 0)
        special = np.zeros(len(lengths), dtype=np.bool_)
        special[[token for token in target.special if token < len(special)]] = True
        self.longest = max(int(lengths.max()), 1)
        self._tokens = len(lengths) - 1
        self._starts = torch.from_numpy(offsets).to(device)
        self._lengths = torch.from_numpy(lengths).to(device)
        self._text_lengths = torch.from_numpy(np.where(special, 0, lengths)).to(device)
        self._is_text = torch.from_numpy(~special).to(device)
        self._is_text[-1] = False
        self._is_exact = torch.from_numpy(np.append(table.exact, False) & ~special).to(device)
        self._ids = torch.from_numpy(np.append(table.segment_ids, 0).astype(np.int64)).to(device)
        self._within = torch.arange(self.longest, device=device)

    def _known(self, tokens: Tensor) -> Tensor:
        """The tokens as indices; one without a segment for what is no token of the target."""
        return torch.where((tokens >= 0) & (tokens < self._tokens), tokens, self._tokens).long()

    def padded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The segments of `tokens`, int [...], padded with anything to the longest there is.

        Returns:
            int64 [..., longest], and int64 [...]: their lengths.
        """
        known = self._known(tokens)
        places = self._starts[known][..., None] + self._within
        return self._ids[places.clamp(max=len(self._ids) - 1)], self._lengths[known]

    def tally(self, tokens: Tensor) -> Tensor:
        """int64 [2]: how many of `tokens`, int [...], are text, and how many the control has as they are."""
        known = self._known(tokens)
        return torch.stack((self._is_text[known].sum(), self._is_exact[known].sum()))

    def lengths(self, tokens: Tensor, prompt: int) -> Tensor:
        """int64 [n]: the lengths of the segments of `tokens`, int [n].

        Special tokens among the first `prompt` have none: a prompt is text for the control, and begins as
        its own prompts do.
        """
        known = self._known(tokens)
        return torch.cat((self._text_lengths[known[:prompt]], self._lengths[known[prompt:]]))

    def joined(self, tokens: Tensor, lengths: Tensor, total: int) -> Tensor:
        """int64 [total]: the segments of `tokens`, int [n], one after another, each cut to its length."""
        token = torch.arange(len(tokens), device=tokens.device)
        token = token.repeat_interleave(lengths, output_size=total)
        within = torch.arange(total, device=tokens.device) - (lengths.cumsum(0) - lengths)[token]
        return self._ids[self._starts[self._known(tokens)][token] + within]


@dataclass(frozen=True)
class History:
    """What the target has read and written, by slot. The engine writes it, on the device."""

    tokens: Tensor
    """int [slots, positions]: prompts, and what was generated after them."""
    length: Tensor
    """int [slots]: how many of them there are."""


@dataclass(frozen=True)
class Join:
    """How the context of a slot begins."""

    slot: int
    tokens: list[int]
    """The control's own prompt."""
    start: int
    end: int
    """The segments of history[start:end] follow on it."""
    prompt: int
    """How many tokens of the history are the target's prompt."""
    keeps_first: bool
    """Whether the first token stays when the context is cut."""


class Contexts:
    """The contexts of one control by slot: `tokens` on the device, and what the host may know of them."""

    def __init__(
        self, segments: Segments, history: History, *, window: int, most_new: int, tally: Tensor
    ) -> None:
        """Prepare as many contexts as the history has slots.

        Args:
            segments: of the target's tokens.
            history: what the contexts follow.
            window: the tokens that a context may have after a step.
            most_new: the target tokens that a step may bring, drafts included.
            tally: int64 [2], to which `Segments.tally` of what was generated is added.
        """
        self._segments, self._history, self._window = segments, history, window
        self._tally = tally
        self._device = history.length.device
        slots, growth = len(history.length), segments.longest * most_new
        self._limit = window - min(max(window // 8, growth), window // 2)
        """A context that could outgrow the window is cut to this: a step that is as long as can be fits."""
        self._waste = window + growth
        """The column that takes what is to be written nowhere."""
        self.tokens = torch.zeros((slots, self._waste + 1), dtype=torch.int32, device=self._device)
        self.length = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._seen = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self.bound = np.zeros(slots, dtype=np.int64)
        """Upper bound on each context's length."""
        self._arriving = np.zeros(slots, dtype=np.int64)
        """Upper bound on the number of tokens of the history that have yet to be taken in."""
        self._keeps_first = np.zeros(slots, dtype=np.bool_)
        self._late = Late(self.length)
        self._grown = np.full((LAG, slots), _UNKNOWN)
        """Upper bound on the growth of each context since each of the late copies was begun."""

    def refresh(self) -> None:
        """Once a step: learn the lengths of `LAG` steps ago, which the bounds can't be far above then."""
        turn = self._late.turn
        self.bound = np.minimum(self.bound, self._late.exchange() + self._grown[turn])
        self._grown[turn] = 0

    def expect(self, slots: NDArray[np.int64], count: int) -> None:
        """Up to `count` target tokens will have come to `slots` before they are advanced again."""
        self._arriving[slots] = count

    def arrives(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `slots` may have tokens that were not taken in yet."""
        return self._arriving[slots] > 0

    def join(self, joins: Sequence[Join]) -> list[int]:
        """Begin contexts. Where parts of the history belong to them, the host reads how long those are.

        Returns:
            The slots whose contexts were cut to the window.
        """
        spans = [self._history.tokens[join.slot, join.start : join.end] for join in joins]
        lengths = [
            self._segments.lengths(span, max(join.prompt - join.start, 0))
            for join, span in zip(joins, spans, strict=True)
        ]
        unknown = any(join.end > join.start for join in joins)
        totals = torch.stack([each.sum() for each in lengths]).tolist() if unknown else [0] * len(joins)
        dropped = [
            self._begin(join, self._segments.joined(*segments))
            for join, *segments in zip(joins, spans, lengths, totals, strict=True)
        ]
        slots = np.array([join.slot for join in joins], dtype=np.int64)
        seen = np.array([join.end for join in joins], dtype=np.int64)
        places, seen_there, length = upload(np.stack((slots, seen, self.bound[slots])), self._device)
        self.length[places], self._seen[places] = length, seen_there
        return [join.slot for join, cut in zip(joins, dropped, strict=True) if cut]

    def _begin(self, join: Join, rest: Tensor) -> int:
        """Write a context's tokens.

        Returns:
            How many were dropped.
        """
        tokens = torch.cat((upload(np.array(join.tokens, dtype=np.int64), self._device), rest))
        dropped, head = dropped_tokens(len(tokens), self._limit), int(join.keeps_first)
        length = len(tokens) - dropped
        self.tokens[join.slot, :head] = tokens[:head]
        self.tokens[join.slot, head:length] = tokens[head + dropped :]
        self.bound[join.slot], self._arriving[join.slot] = length, 0
        self._keeps_first[join.slot] = join.keeps_first
        self._grown[:, join.slot] = _UNKNOWN
        return dropped

    def advance(self, slots: NDArray[np.int64], places: Tensor) -> NDArray[np.int64]:
        """Take in what came to `slots`; `places` are the same on the device.

        Returns:
            int64 [slots]: upper bound on the tokens that each context has grown by.
        """
        growth: NDArray[np.int64] = self._arriving[slots] * self._segments.longest
        if count := int(self._arriving[slots].max(initial=0)):
            self._take(places, count)
            self.bound[slots] += growth
            self._grown[:, slots] += growth
            self._arriving[slots] = 0
        return growth

    def _take(self, places: Tensor, count: int) -> None:
        seen = self._seen[places]
        new = (self._history.length[places] - seen).clamp(0, count)
        ahead = torch.arange(count, device=self._device)
        positions = (seen[:, None] + ahead).clamp(max=self._history.tokens.shape[1] - 1)
        tokens = self._history.tokens[places[:, None], positions]
        tokens = torch.where(ahead < new[:, None], tokens, -1)
        self._tally += self._segments.tally(tokens)
        self.length[places] = self._write(places, tokens)[:, -1]
        self._seen[places] = seen + new

    def ends(self, places: Tensor, drafts: Tensor) -> Tensor:
        """Where each context ends now and after each draft, which are written behind it to no account.

        Args:
            places: int64 [n], the slots.
            drafts: int64 [n, drafts], target tokens; -1 for none.

        Returns:
            int64 [n, 1 + drafts], at most the window.
        """
        now = self.length[places][:, None]
        return torch.cat((now, self._write(places, drafts)), dim=1).clamp(max=self._window)

    def _write(self, places: Tensor, tokens: Tensor) -> Tensor:
        """Write the segments of `tokens`, int [n, k], behind the contexts, and give where each ends."""
        ids, lengths = self._segments.padded(tokens)
        ends = self.length[places][:, None] + lengths.cumsum(1)
        within = torch.arange(ids.shape[-1], device=self._device)
        columns = (ends - lengths)[..., None] + within
        columns = torch.where(within < lengths[..., None], columns, self._waste).clamp(max=self._waste)
        self.tokens[places[:, None, None], columns] = ids.int()
        return ends

    def fit(self, slots: NDArray[np.int64], places: Tensor, extra: int) -> list[int]:
        """Cut those contexts that `extra` more tokens could carry past the window.

        The host waits for the lengths, once in about half a window.

        Returns:
            The slots whose contexts were cut.
        """
        if (self.bound[slots] + extra <= self._window).all():
            return []
        self.bound[slots] = self.length[places].cpu().numpy()
        cut: list[int] = slots[self.bound[slots] > self._limit].tolist()
        for slot in cut:
            self._cut(slot)
        return cut

    def _cut(self, slot: int) -> None:
        length, head = int(self.bound[slot]), int(self._keeps_first[slot])
        dropped = dropped_tokens(length, self._limit)
        self.tokens[slot, head : length - dropped] = self.tokens[slot, head + dropped : length].clone()
        self.length[slot] = self.bound[slot] = length - dropped
