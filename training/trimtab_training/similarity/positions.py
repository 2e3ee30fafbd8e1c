"""Positions that are comparable across tokenizers: bytes of a text where a token of every model ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trimtab_mappings import Vocabulary
from trimtab_mappings.texts import TextError, read_texts
from trimtab_training.evaluation.questions import load_questions
from trimtab_training.evaluation.recipe import Question
from trimtab_training.recipe_file import RecipeError
from trimtab_training.similarity.recipe import SimilarityRecipe


class Passage(NamedTuple):
    """A text whose positions are compared."""

    prompt: Question | None
    """The question that `text` answers."""
    text: str


class Reading(NamedTuple):
    """A passage in a model's tokens."""

    ids: Sequence[int]
    """The prompt and the text."""
    ends: Mapping[int, int]
    """The number of tokens before each offset: see `token_ends`."""


class Position(NamedTuple):
    """A place in a passage, between two tokens of every model."""

    passage: int
    offset: int
    """The number of bytes of the passage's text before it."""


def load_passages(recipe: SimilarityRecipe) -> list[Passage]:
    """Read the texts, cut into pieces, or the questions with their first answers.

    Raises:
        RecipeError: a file can't be read, or a question has no answer.
    """
    if recipe.texts is None:
        return list(_answers(recipe))
    try:
        texts = read_texts([recipe.texts])
    except TextError as error:
        raise RecipeError(f"`texts`: {error}") from error
    size = recipe.max_characters
    pieces = (text[start : start + size] for text in texts for start in range(0, len(text), size))
    return [Passage(None, piece) for piece in pieces if piece.strip()]


def _answers(recipe: SimilarityRecipe) -> Iterator[Passage]:
    given = recipe.questions or ()
    read = load_questions(Path(given)) if isinstance(given, str) else given
    for number, question in enumerate(read, start=1):
        if not (question.answer and question.answer[0].strip()):
            raise RecipeError(
                f"`questions`: record {number} ({question.text[:60]!r}) has no `answer`. Add one"
            )
        yield Passage(question, question.answer[0])


def token_ends(ids: Sequence[int], vocabulary: Vocabulary, text: bytes) -> dict[int, int]:
    """Find where tokens end in `text`, which is the end of what `ids` spell.

    Special tokens behind the text are no part of it; those right before an offset count as before it.

    Returns:
        The number of tokens before each byte offset from 0 to `len(text)`. Empty if the tokens do not spell
        `text` byte by byte, for instance because the tokenizer lacks a character.
    """
    count = len(ids)
    while count and ids[count - 1] in vocabulary.special:
        count -= 1
    pieces = [vocabulary.tokens[token] for token in ids[:count]]
    if not b"".join(pieces).endswith(text):
        return {}
    offset = len(text)
    ends: dict[int, int] = {}
    for before in range(count, 0, -1):
        if offset < 0:
            break
        ends.setdefault(offset, before)
        offset -= len(pieces[before - 1])
    return ends


def common_positions(readings: Sequence[Sequence[Reading]]) -> list[Position]:
    """List the offsets where every model has the end of a token.

    Args:
        readings: [models][passages].
    """
    return [
        Position(passage, offset)
        for passage, of_models in enumerate(zip(*readings, strict=True))
        for offset in sorted(set.intersection(*(set(reading.ends) for reading in of_models)))
    ]


def sample(positions: Sequence[Position], most: int, rng: np.random.Generator) -> list[Position]:
    """Draw `most` of `positions` without replacement, in their order; all of them if there are no more."""
    if len(positions) <= most:
        return list(positions)
    return [positions[place] for place in sorted(rng.choice(len(positions), most, replace=False))]
