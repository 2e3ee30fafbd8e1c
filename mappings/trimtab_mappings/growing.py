"""The encoding of a text that grows at its end, at a cost that does not grow with the text."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trimtab_mappings.encoder import ByteEncoder

_STRIDE = 256
_MARGIN = 64
_SPACE = 0x20
_ATTEMPTS = 4  # places that are tried before the text is let grow by another stride


class GrowingEncoding:
    """What `ByteEncoder.encode` gives for a growing text, by encoding only what stands behind a joint.

    A joint is a place across which no token can reach, since no token of the vocabulary has the two bytes
    beside it next to each other: there BPE's merges fall into two. A tokenizer that first cuts a text into
    words, by rules that may count from where a word begins, has joints only before the space between two
    words. Unigram sums scores over a word, in which ties are decided by rounding: without words, it has none.
    Nor has a text that the tokenizer itself can't spell: it is encoded whole at every step. A joint is taken
    only if both sides, encoded apart, give the tokens that they gave together, with `margin` bytes behind it.
    """

    def __init__(self, encoder: ByteEncoder, *, stride: int = _STRIDE, margin: int = _MARGIN) -> None:
        """Begin with an empty text.

        Args:
            encoder: whose encoding it is.
            stride: how many bytes are encoded anew before a joint is looked for.
            margin: how many bytes stay behind a joint, at least.
        """
        self._encoder = encoder
        self._stride, self._margin = stride, margin
        self._joint = 0
        self._settled = 0
        """How many tokens stand before the joint."""
        self._search_at = stride

    def encode(self, text: bytes | bytearray, *, final: bool = False) -> tuple[int, list[int]]:
        """Encode `text`, which begins as the last one did; a final one waits for no character's last byte.

        Returns:
            How many tokens are as they were, and the tokens behind them.
        """
        rest = bytes(text[self._joint :])
        ids = self._natively(rest)
        if ids is None and self._joint:
            self._joint, self._settled, rest = 0, 0, bytes(text)
        settled = self._settled
        if ids is None or final:
            ids = self._encode(rest, final=final)
        elif len(rest) >= self._search_at:
            self._move_joint(rest, ids)
        return settled, ids

    def _natively(self, data: bytes) -> list[int] | None:
        return self._encoder.encode_natively(data)

    def _encode(self, data: bytes, *, final: bool) -> list[int]:
        return self._encoder.encode_all([data])[0] if final else self._encoder.encode(data)[0]

    def _move_joint(self, rest: bytes, ids: Sequence[int]) -> None:
        self._search_at = len(rest) + self._stride
        for place in islice(self._candidates(rest), _ATTEMPTS):
            before = self._encode(rest[:place], final=True)
            if before + self._encode(rest[place:], final=False) == ids:
                self._joint += place
                self._settled += len(before)
                self._search_at = self._stride
                return

    def _candidates(self, rest: bytes) -> Iterator[int]:
        """The places where a joint could be, the last one first."""
        words, pairs = self._encoder.cuts_words, self._encoder.pairs
        if self._encoder.scores_words and not words:
            return
        fits = _is_between_words if words else _is_between_characters
        for place in range(len(rest) - self._margin, 0, -1):
            if fits(rest, place) and rest[place - 1 : place + 1] not in pairs:
                yield place


def _is_between_words(text: bytes, place: int) -> bool:
    return text[place] == _SPACE and not text[place - 1 : place].isspace()


def _is_between_characters(text: bytes, place: int) -> bool:
    return text[place] & 0xC0 != 0x80
