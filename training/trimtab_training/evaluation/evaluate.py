"""What `trimtab eval` does: ask, score, summarize, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from trimtab_training.evaluation.control import LoadedControl, Setting, settings_of
from trimtab_training.evaluation.offline import Offline
from trimtab_training.evaluation.questions import QuestionGroup, load_group
from trimtab_training.evaluation.recipe import EvalRecipe
from trimtab_training.evaluation.report import prepare_directory, write
from trimtab_training.evaluation.results import Answer, Cell, score_answers, summarize
from trimtab_training.evaluation.target import load_target

Progress = Callable[[int, int], None]
"""Told the number of answers so far, and of all."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a recipe."""

    cells: list[Cell]
    answers: list[Answer]
    seconds: float
    """Time of the answers, without loading."""


def evaluate(recipe: EvalRecipe, progress: Progress = lambda _done, _total: None) -> Evaluation:
    """Ask all questions of a recipe under all its settings, and write what was measured to its directory.

    Raises:
        RecipeError: something that the recipe names can't be used.
    """
    groups = [load_group(group) for group in recipe.groups]
    prepare_directory(recipe.output_dir, overwrite=recipe.overwrite_output_dir)
    settings = settings_of(recipe)
    asker = _offline(
        recipe, _counter(progress, len(settings) * sum(len(group.questions) for group in groups))
    )
    started = time.monotonic()
    answers = [answer for group in groups for answer in _ask(asker, group, settings, recipe)]
    seconds = time.monotonic() - started
    cells = summarize(answers, recipe.bootstrap)
    write(recipe.output_dir, cells, answers, _about(recipe, seconds, len(answers)))
    return Evaluation(cells, answers, seconds)


def _offline(recipe: EvalRecipe, progress: Callable[[int], None]) -> Offline:
    target = load_target(recipe.target)
    control = None if recipe.control is None else LoadedControl(recipe.control, target, recipe.tables)
    return Offline(
        target=target,
        control=control,
        max_new_tokens=recipe.max_new_tokens,
        stop=recipe.stop,
        batch_size=recipe.per_device_eval_batch_size,
        system_prompt=recipe.system_prompt,
        progress=progress,
    )


def _ask(
    asker: Offline, group: QuestionGroup, settings: Sequence[Setting], recipe: EvalRecipe
) -> list[Answer]:
    texts = asker.answers(group.questions, settings)
    return score_answers(group, settings, texts, recipe.refusals)


def _about(recipe: EvalRecipe, seconds: float, answers: int) -> dict[str, Any]:
    return {
        "trimtab": version("trimtab"),
        "recipe": recipe.model_dump(mode="json"),
        "answers": answers,
        "seconds": round(seconds, 3),
    }


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return add
