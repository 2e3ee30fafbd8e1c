"""Alignment: the tokens that a target generates, as the tokens of a control's context.

Mode `retokenize`, as in the reference implementation of cross-model control: a generated token whose bytes
are a control token is appended as that token; after any other token the generated text is tokenized anew.
After every step the control's text is the target's text, but for an incomplete UTF-8 sequence at its end,
which waits.

With the routing `pieces`, a spelling may be *pending*: the target's last tokens are the first pieces of a
control token. When the target continues the spelling, the text is tokenized again, so that the context gets
the whole control token.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, NamedTuple

from trimtab_mappings import GrowingEncoding
from trimtab_mappings.trie import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trimtab_mappings import ByteEncoder, MappingTable, Vocabulary


_NONE: Mapping[tuple[int, int], int] = {}


class Aligner:
    """What the alignments of one target to one control share."""

    def __init__(self, target: Vocabulary, encoder: ByteEncoder, table: MappingTable) -> None:
        table.check(target, encoder.vocabulary)
        self.target = target
        self.encoder = encoder
        encoder.pairs  # noqa: B018 - computed here, not within a step
        self.mapping: list[int] = table.mapping.tolist()
        self.exact: list[bool] = table.exact.tolist()

    def text(self, tokens: Iterable[int]) -> bytes:
        """The text of target tokens; specials, and ids past the vocabulary, have none."""
        return b"".join(self.target.tokens[token] for token in tokens if token < len(self.target.tokens))

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """The text of a target's prompt, without the space that its tokenizer puts before every text."""
        text = self.text(tokens).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.target.dummy_prefix else text


class AlignmentCounts(NamedTuple):
    """What an alignment has done so far."""

    tokens: int = 0
    """Tokens of text that it took in."""
    exact: int = 0
    """Those of them that were appended as one token of the same bytes."""
    realignments: int = 0
    """How often the text was tokenized anew."""


class Alignment:
    """The control's context of one request: its prompt, then what the target generated.

    The text between two special tokens is a run; a run is tokenized by itself.
    """

    def __init__(
        self, aligner: Aligner, prompt: Sequence[int], children: Mapping[tuple[int, int], int] = _NONE
    ) -> None:
        """Begin behind `prompt`, in control tokens. `children`: those of a routing."""
        self._aligner = aligner
        self._children = children
        self._taken = 0
        self._node = ROOT
        self.begun = 0
        """How many target tokens there were before the spelling that is pending."""
        self.tokens = list(prompt)
        """The context, in control tokens."""
        self.counts = AlignmentCounts()
        self._run = bytearray()
        self._encoding = GrowingEncoding(aligner.encoder)
        self._run_start = len(self.tokens)
        self._settled = 0
        """Bytes of the run that were tokenized as text; the rest of it came in exact tokens."""
        self._exact: list[int] = []
        """The control tokens of the run's bytes past `_settled` that are not in `tokens` yet."""
        self._stale = False
        """Whether run[:settled] has yet to be tokenized."""

    @property
    def waiting(self) -> int:
        """How many bytes of an incomplete UTF-8 sequence wait at the end for the rest of it."""
        return incomplete_tail(self._run) if self._settled == len(self._run) else 0

    @property
    def pending(self) -> int | None:
        """The node of the spelling that is pending, see `PieceTrie`; None where none is."""
        return self._node if self._node >= 0 else None

    def extend(self, generated: Iterable[int]) -> int:
        """Take in target tokens, and bring `tokens` up to date.

        Returns:
            How many tokens at the start of the context are as they were.
        """
        kept = len(self.tokens)
        for token in generated:
            goes_on = self._follow(token)
            if token >= len(self._aligner.mapping):
                continue
            if token in self._aligner.target.special:
                kept = min(kept, self._end_run(token))
            else:
                self._append(token, goes_on=goes_on)
        return min(kept, self._settle())

    def _follow(self, token: int) -> bool:
        """Follow the spellings of the control's tokens; whether `token` goes on with one."""
        child = self._children.get((self._node, token)) if self._node >= 0 else None
        goes_on = child is not None
        if child is None:
            child, self.begun = self._children.get((ROOT, token), ROOT), self._taken
        self._node = child
        self._taken += 1
        return goes_on

    def _append(self, token: int, *, goes_on: bool) -> None:
        waiting = self.waiting
        self._run += self._aligner.target.tokens[token]
        exact = self._aligner.exact[token] and not waiting and not goes_on
        self._add(tokens=1, exact=int(exact))
        if exact:
            self._exact.append(self._aligner.mapping[token])
        else:
            self._settled, self._stale = len(self._run), True
            self._exact.clear()

    def _add(self, *, tokens: int = 0, exact: int = 0, realignments: int = 0) -> None:
        was = self.counts
        self.counts = AlignmentCounts(was.tokens + tokens, was.exact + exact, was.realignments + realignments)

    def _end_run(self, special: int) -> int:
        """Close the run before a special token, whose counterpart (if it has one) is appended."""
        kept = self._settle(final=True)
        if (counterpart := self._aligner.mapping[special]) >= 0:
            self.tokens.append(counterpart)
        self._run.clear()
        self._encoding = GrowingEncoding(self._aligner.encoder)
        self._run_start, self._settled = len(self.tokens), 0
        return kept

    def _settle(self, *, final: bool = False) -> int:
        """Write the run's tokens into the context; a final run waits for nothing."""
        kept = len(self.tokens)
        if self._stale or (final and self.waiting):
            kept = self._retokenize(final=final)
        self.tokens += self._exact
        self._exact.clear()
        return kept

    def _retokenize(self, *, final: bool) -> int:
        settled, fresh = self._encoding.encode(self._run[: self._settled], final=final)
        start = self._run_start + settled
        kept = start + common_prefix(self.tokens[start:], fresh)
        self.tokens[kept:] = fresh[kept - start :]
        self._add(realignments=1)
        self._stale = False
        return kept


def incomplete_tail(data: bytes | bytearray) -> int:
    """How many bytes at the end of `data` begin a UTF-8 sequence without ending it: 0 to 3."""
    for length in range(1, min(len(data), 3) + 1):
        if data[-length] >= 0xC0:
            return length if _is_incomplete(bytes(data[-length:])) else 0
        if data[-length] < 0x80:
            return 0
    return 0


def _is_incomplete(sequence: bytes) -> bool:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(sequence) == ""
    except UnicodeDecodeError:
        return False


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many items at their starts are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def dropped_tokens(length: int, limit: int) -> int:
    """How many tokens to leave out of a context of `length` for a window of `limit`: whole strides of half a
    window.

    So the window moves once in `limit / 2` tokens, and only then is the context computed anew.
    """
    stride = max(limit // 2, 1)
    return -(-max(length - limit, 0) // stride) * stride
