"""Prose as a small language model learns it: in pieces, and in those tokens of a real tokenizer that occur.

With the whole vocabulary the output layer would take all the time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from trimtab_mappings import ByteEncoder

PIECE = re.compile(r".{1,480}(?=\s|\Z)", re.DOTALL)
"""What is learnt and read at a time: some 110 tokens, cut between words."""


def cut(texts: Sequence[str], count: int) -> list[str]:
    """`count` pieces of `texts`, drawn at random; some of them twice where there are too few."""
    pieces = [piece for text in texts for piece in PIECE.findall(text)]
    rng = random.Random(0)
    return rng.sample(pieces, count) if count <= len(pieces) else rng.choices(pieces, k=count)


def beginning(encoder: ByteEncoder) -> int:
    return encoder.vocabulary.roles["bos"][0]


class Occurring:
    """The tokens that occur, under ids that count them; 0 begins, ends and pads.

    To the training it is the tokenizer.
    """

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, encoder: ByteEncoder, texts: Sequence[str], others: Iterable[int] = ()) -> None:
        """Args: others: tokens of `encoder` that have an id, too, without being in `texts`."""
        encoded = encoder.encode_all([text.encode() for text in texts])
        self._encoded = dict(zip(texts, encoded, strict=True))
        bos = beginning(encoder)
        self.taught = {bos}.union(*encoded)
        self.tokens = [bos, *sorted({*self.taught, *others} - {bos})]
        """The tokenizer's own ids, by id here."""
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __call__(self, texts: Iterable[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0, *self.ids(self._encoded[text])] for text in texts]}

    def ids(self, tokens: Iterable[int]) -> list[int]:
        """The ids here of the tokenizer's own; 0 for a token that does not occur."""
        return [self._ids.get(token, 0) for token in tokens]
