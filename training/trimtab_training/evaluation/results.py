"""What was measured: an answer with its scores, and a cell, the mean of one score over a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab_training.evaluation.bootstrap import Estimate, changes, drawn_questions, estimate
from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.questions import QuestionGroup
from trimtab_training.evaluation.recipe import BootstrapSettings
from trimtab_training.evaluation.scores import score_of


@dataclass(frozen=True)
class Answer:
    """What the target said to a question, and how that scores."""

    group: str
    number: int
    """The question's place in its group, from 1."""
    question: str
    expected: tuple[str, ...]
    setting: Setting
    text: str
    scores: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """The answer as JSON has it."""
        data = asdict(self)
        return {**data, **data.pop("setting")._asdict()}


@dataclass(frozen=True)
class Cell:
    """The mean of one score over the questions of a group, under one setting."""

    group: str
    score: str
    setting: Setting
    questions: int
    value: Estimate
    change: Estimate | None
    """The change from strength 0; None if that was not asked."""

    def plain(self) -> dict[str, Any]:
        """The cell as JSON has it."""
        return {
            "group": self.group,
            "score": self.score,
            **self.setting._asdict(),
            "questions": self.questions,
            **self.value._asdict(),
            "change": None if self.change is None else self.change._asdict(),
        }


def score_answers(
    group: QuestionGroup, settings: Sequence[Setting], texts: Sequence[Sequence[str]], refusals: Sequence[str]
) -> list[Answer]:
    """Score all answers of a group.

    Args:
        group: the questions.
        settings: under which they were asked.
        texts: [settings][questions].
        refusals: the phrases that make a refusal.
    """
    return [
        Answer(
            group=group.name,
            number=number,
            question=question.text,
            expected=question.answer,
            setting=setting,
            text=text,
            scores={name: score_of(name, text, question.answer, refusals) for name in group.scores},
        )
        for setting, of_setting in zip(settings, texts, strict=True)
        for number, (question, text) in enumerate(zip(group.questions, of_setting, strict=True), start=1)
    ]


def summarize(answers: Sequence[Answer], bootstrap: BootstrapSettings) -> list[Cell]:
    """The cells of all groups, scores and settings, in the order of `answers`."""
    values: dict[tuple[str, str], dict[Setting, list[float]]] = {}
    for answer in answers:
        for name, score in answer.scores.items():
            by_setting = values.setdefault((answer.group, name), {})
            by_setting.setdefault(answer.setting, []).append(score)
    return [
        cell
        for (group, score), by_setting in values.items()
        for cell in _cells(group, score, by_setting, bootstrap)
    ]


def _cells(
    group: str, score: str, values: dict[Setting, list[float]], bootstrap: BootstrapSettings
) -> list[Cell]:
    count = len(next(iter(values.values())))
    drawn = drawn_questions(count, bootstrap.draws, bootstrap.seed)
    base = next((setting for setting in values if not setting.strength), None)
    moved = {} if base is None else changes(values, base, drawn, bootstrap.level)
    return [
        Cell(group, score, setting, count, estimate(each, drawn, bootstrap.level), moved.get(setting))
        for setting, each in values.items()
    ]
