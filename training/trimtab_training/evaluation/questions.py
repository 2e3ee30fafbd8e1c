"""Reads the questions of a recipe, and checks that their scores can be computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimtab_training.evaluation.recipe import Group, Question
from trimtab_training.evaluation.scores import NEED_ANSWER, ScoreName
from trimtab_training.recipe_file import RecipeError


@dataclass(frozen=True)
class QuestionGroup:
    """Questions that were read, and what is measured of their answers."""

    name: str
    questions: tuple[Question, ...]
    scores: tuple[ScoreName, ...]


def load_group(group: Group) -> QuestionGroup:
    """Read a group's questions.

    Raises:
        RecipeError: the file can't be read, a record is wrong, or a score needs an answer that is missing.
    """
    read = load_questions(Path(group.questions)) if isinstance(group.questions, str) else group.questions
    needing = [score for score in group.scores if score in NEED_ANSWER]
    for number, question in enumerate(read, start=1):
        if needing and not any(answer.strip() for answer in question.answer):
            raise RecipeError(
                f"`groups`: group {group.name!r}: question {number} ({question.text[:60]!r}) has no `answer`,"
                f" which the score `{needing[0]}` needs"
            )
    return QuestionGroup(group.name, tuple(read), group.scores)


def load_questions(path: Path) -> Sequence[Question]:
    """The records of a file: JSON Lines, a JSON list or a YAML list, whatever the file's name.

    Raises:
        RecipeError: the file can't be read, is empty, or a record of it is wrong; the message has its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"`questions`: {path} can't be read: {error}") from error
    records = _records(text, path)
    if not records:
        raise RecipeError(f"`questions`: {path} has no records")
    return [_question(record, path, number) for number, record in enumerate(records, start=1)]


def _records(text: str, path: Path) -> list[Any]:
    if text.lstrip().startswith("{"):
        return [_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        data = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise RecipeError(f"`questions`: {path} is neither JSON Lines nor a JSON or YAML list") from error
    if data is not None and not isinstance(data, list):
        raise RecipeError(f"`questions`: {path} must hold a list of records, got {type(data).__name__}")
    return data or []


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RecipeError(f"`questions`: {path}, line {number} is not JSON: {line[:60]!r}") from error


def _question(record: Any, path: Path, number: int) -> Question:
    try:
        return Question.model_validate({"question": record} if isinstance(record, str) else record)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        place = f"`questions`: {path}, record {number}{f', `{key}`' if key else ''}"
        raise RecipeError(f"{place}: {fault['msg'].removeprefix('Value error, ')}") from error
