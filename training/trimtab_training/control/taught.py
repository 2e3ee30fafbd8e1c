"""What a teacher behind a server answered, as examples in the template's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from trimtab_mappings import ByteEncoder
from trimtab_training.control.examples import Example, ExampleEncoder, answered
from trimtab_training.control.formats import DataError, Record
from trimtab_training.control.teacher_server import Choice
from trimtab_training.control.top_log_probs import TopLogProbs

_LEAST_REST = 1e-9
"""The least mass of the bucket: rounded log-probabilities may leave none."""


@dataclass(frozen=True)
class Scored:
    """A token of the teacher's: its bytes, its log-probability, and those of the likeliest in its place."""

    data: bytes
    log_prob: float
    top: tuple[tuple[bytes, float], ...] = ()


class TaughtEncoder:
    """Makes examples of a teacher's answers."""

    def __init__(self, encoder: ExampleEncoder) -> None:
        self._encoder = encoder

    @cached_property
    def _tokens(self) -> TeacherTokens:
        return TeacherTokens(self._encoder.byte_encoder)

    def said(self, record: Record, choice: Choice) -> Example:
        """An example of what the teacher said: its text, in the template's tokens.

        Raises:
            DataError: the answer is empty.
        """
        text = (choice.get("message") or {}).get("content")
        if not text:
            raise DataError(f"{record.place}: the teacher's answer is empty. Leave the record out")
        return Example(self._encoder.answer(record, text, ended=not _is_cut(choice)))

    def distributions(self, record: Record, prompt: tuple[int, ...], choice: Choice) -> Example:
        """An example of the teacher's tokens, with its distributions at them.

        Raises:
            DataError: the answer has none, is empty, or has other tokens than the template would say.
        """
        scored = list(_scored(record, choice))
        found = self._tokens.find(scored, is_cut=_is_cut(choice))
        if found is None:
            text = b"".join(token.data for token in scored).decode(errors="replace")
            raise DataError(
                f"{record.place}: the teacher's answer {text[:80]!r} is not in the tokens that the template's"
                " tokenizer has for it. `distill` needs a teacher with the template's vocabulary."
                " With `objective: cross_entropy` any teacher will do"
            )
        ids, top = found
        room = self._encoder.room(len(prompt))
        return Example(answered(prompt, ids[:room]), taught=top[:room])


class TeacherTokens:
    """Finds a teacher's tokens in the template's vocabulary, by their bytes."""

    def __init__(self, encoder: ByteEncoder) -> None:
        self._encoder = encoder
        self._specials = {name.encode(): token for token, name in encoder.vocabulary.names.items()}

    def find(self, scored: Sequence[Scored], *, is_cut: bool) -> tuple[list[int], TopLogProbs] | None:
        """The template's tokens for an answer, with the distributions; None if they are not the teacher's.

        Of an answer that `max_new_tokens` cut within a word, that word may have other tokens than its part.
        Then it is left out.
        """
        ids = self._ids(scored)
        if ids is None and is_cut:
            starts = [place for place, token in enumerate(scored) if token.data[:1].isspace()]
            scored = scored[: starts[-1]] if starts else []
            ids = self._ids(scored)
        return (ids, self._top(ids, scored)) if ids else None

    def _ids(self, scored: Sequence[Scored]) -> list[int] | None:
        ids: list[int] = []
        for is_special, group in groupby(scored, key=lambda token: token.data in self._specials):
            pieces = [token.data for token in group]
            if is_special:
                ids += [self._specials[piece] for piece in pieces]
            else:
                ids += self._encoder.encode_all([b"".join(pieces)])[0]
        pairs = zip(scored, ids, strict=False)
        same = len(ids) == len(scored) and all(self._is(token, data) for token, data in pairs)
        return ids if same else None

    def _is(self, scored: Scored, token: int) -> bool:
        """Whether both are the same token. vLLM gives a character's bytes to the last of its tokens."""
        if token in self._encoder.vocabulary.special:
            return True
        data = self._encoder.vocabulary.tokens[token]
        return data == scored.data or not _is_text(data)

    def _top(self, ids: Sequence[int], scored: Sequence[Scored]) -> TopLogProbs:
        rows = [self._row(token, each) for token, each in zip(ids, scored, strict=True)]
        kept = [len(row) for row in rows]
        width = max(kept)
        padded = [[*row.items(), *[next(iter(row.items()))] * (width - len(row))] for row in rows]
        masses = [math.fsum(map(math.exp, row.values())) for row in rows]
        return TopLogProbs(
            ids=torch.tensor([[token for token, _ in row] for row in padded]),
            log_probs=torch.tensor([[log_prob for _, log_prob in row] for row in padded]),
            kept=torch.tensor(kept),
            rest=torch.tensor([math.log(max(1 - mass, _LEAST_REST)) for mass in masses]),
        )

    def _row(self, token: int, scored: Scored) -> dict[int, float]:
        """Log-probabilities by token. One that the template does not have is in the rest."""
        row = {token: scored.log_prob}
        for data, log_prob in scored.top:
            other = self._specials.get(data, self._encoder.vocabulary.ids.get(data))
            if other is not None:
                row.setdefault(other, log_prob)
        return row


def _scored(record: Record, choice: Choice) -> Iterator[Scored]:
    content = (choice.get("logprobs") or {}).get("content")
    if content is None or any(not entry.get("top_logprobs") for entry in content):
        raise DataError(
            f"{record.place}: the teacher's server gave no `logprobs` with `top_logprobs`, which `distill`"
            " needs. Take a server that gives them, or `objective: cross_entropy`"
        )
    if not content:
        raise DataError(f"{record.place}: the teacher's answer is empty. Leave the record out")
    for entry in content:
        top = tuple((_data(other), float(other["logprob"])) for other in entry["top_logprobs"])
        yield Scored(_data(entry), float(entry["logprob"]), top)


def _data(entry: dict[str, Any]) -> bytes:
    data = entry.get("bytes")
    return str(entry["token"]).encode() if data is None else bytes(data)


def _is_cut(choice: Choice) -> bool:
    return choice.get("finish_reason") == "length"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
