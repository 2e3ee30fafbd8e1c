"""What `trimtab eval` does: ask, score, summarize, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from trimtab_training.evaluation.control import LoadedControl, Setting, settings_of
from trimtab_training.evaluation.gateway import Gateway
from trimtab_training.evaluation.offline import Offline
from trimtab_training.evaluation.questions import QuestionGroup, load_group
from trimtab_training.evaluation.recipe import EvalRecipe
from trimtab_training.evaluation.report import TableData, cells_table, prepare_directory, write
from trimtab_training.evaluation.results import Answer, Cell, score_answers, summarize
from trimtab_training.evaluation.target import load_target
from trimtab_training.evaluation.tofu_run import TofuResult, load_tofu, run_tofu, tofu_table, write_tofu
from trimtab_training.recipe_file import RecipeError

Progress = Callable[[int, int], None]
"""Told the number of answers so far, and of all."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a recipe."""

    cells: list[Cell]
    answers: list[Answer]
    seconds: float
    """Time of the answers, without loading."""
    tofu: list[TofuResult] = field(default_factory=list)

    @property
    def tables(self) -> list[TableData]:
        """What was measured, for people."""
        tables = [cells_table(self.cells)] if self.cells else []
        return [*tables, tofu_table(self.tofu)] if self.tofu else tables


def evaluate(recipe: EvalRecipe, progress: Progress = lambda _done, _total: None) -> Evaluation:
    """Ask all questions of a recipe under all its settings, and write what was measured to its directory.

    Raises:
        RecipeError: something that the recipe names can't be used.
    """
    groups = [load_group(group) for group in recipe.groups]
    tofu = None if recipe.tofu is None else load_tofu(recipe.tofu)
    prepare_directory(recipe.output_dir, overwrite=recipe.overwrite_output_dir)
    settings = settings_of(recipe)
    each = sum(len(group.questions) for group in groups) + (0 if tofu is None else tofu.count)
    count = _counter(progress, len(settings) * each)
    asker = _offline(recipe, count) if recipe.gateway is None else _gateway(recipe, recipe.gateway, count)
    started = time.monotonic()
    answers = [answer for group in groups for answer in _ask(asker, group, settings, recipe)]
    results = []
    if tofu is not None and recipe.tofu is not None and isinstance(asker, Offline):
        results = run_tofu(tofu, recipe.tofu, asker, settings)
    seconds = time.monotonic() - started
    evaluation = Evaluation(summarize(answers, recipe.bootstrap), answers, seconds, results)
    _write(recipe, evaluation)
    return evaluation


def _write(recipe: EvalRecipe, evaluation: Evaluation) -> None:
    about = _about(recipe, evaluation)
    write(recipe.output_dir, evaluation.cells, evaluation.answers, about, evaluation.tables)
    if recipe.tofu is not None:
        write_tofu(recipe.output_dir, evaluation.tofu, recipe.tofu)
        if refused := next((result.refused for result in evaluation.tofu if result.refused), None):
            raise RecipeError(f"{refused}. Everything else is in {recipe.output_dir}")


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


def _gateway(recipe: EvalRecipe, url: str, progress: Callable[[int], None]) -> Gateway:
    return Gateway(
        url=url,
        model=recipe.target.model_name_or_path,
        control=recipe.control,
        max_new_tokens=recipe.max_new_tokens,
        stop=recipe.stop,
        requests_at_once=recipe.per_device_eval_batch_size,
        system_prompt=recipe.system_prompt,
        progress=progress,
    )


def _ask(
    asker: Offline | Gateway, group: QuestionGroup, settings: Sequence[Setting], recipe: EvalRecipe
) -> list[Answer]:
    texts = asker.answers(group.questions, settings)
    return score_answers(group, settings, texts, recipe.refusals)


def _about(recipe: EvalRecipe, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "trimtab": version("trimtab"),
        "recipe": recipe.model_dump(mode="json"),
        "answers": len(evaluation.answers),
        "seconds": round(evaluation.seconds, 3),
        "tofu": [result.plain() for result in evaluation.tofu],
    }


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return add
