"""What `trimtab similarity` does: read, measure, compare, write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from trimtab_training.evaluation.report import (
    PLOT,
    RESULTS,
    TABLE,
    TableData,
    interval,
    markdown,
    number,
    prepare_directory,
)
from trimtab_training.recipe_file import RecipeError
from trimtab_training.similarity.compare import MEASURES, Pair, compare
from trimtab_training.similarity.heat_map import heat_maps
from trimtab_training.similarity.positions import Position, common_positions, load_passages, sample
from trimtab_training.similarity.recipe import SimilarityRecipe
from trimtab_training.similarity.shifts import Reader, measure_shifts


@dataclass(frozen=True)
class Similarity:
    """The result of a recipe."""

    pairs: list[Pair]
    positions: int
    """Number of positions that were compared."""
    texts: int
    """Number of texts that they are in."""
    texts_without: int
    """Number of texts that have no position, before a sample is drawn."""

    @property
    def table(self) -> TableData:
        """A row for each pair of one task."""
        header = ["shift of", "on", "task", "exact"]
        for measure in MEASURES:
            header += [measure.replace("_", " "), "shuffled", "other task"]
        return header, [_row(pair) for pair in self.pairs if pair.same_task]


def run(recipe: SimilarityRecipe, report: Callable[[str], None] = lambda _line: None) -> Similarity:
    """Compare the models of a recipe, and write the results to its directory.

    Raises:
        RecipeError: something that the recipe names can't be used, or there are no common positions.
    """
    passages = load_passages(recipe)
    readers = [Reader(model) for model in recipe.models]
    readings = [[reader.read(passage, recipe.system_prompt) for passage in passages] for reader in readers]
    rng = np.random.default_rng(recipe.seed)
    common = common_positions(readings)
    _require_positions(common)
    positions = sample(common, recipe.max_positions, rng)
    prepare_directory(recipe.output_dir, overwrite=recipe.overwrite_output_dir)
    shifts = [
        measure_shifts(*each, positions, recipe, report) for each in zip(readers, readings, strict=True)
    ]
    pairs = compare(readers, shifts, positions, recipe, rng)
    used, usable = (len({position.passage for position in each}) for each in (positions, common))
    similarity = Similarity(pairs, len(positions), used, len(passages) - usable)
    _write(recipe, similarity)
    return similarity


def _require_positions(positions: list[Position]) -> None:
    if len(positions) < 2:
        raise RecipeError(
            f"`texts` or `questions`: there are {len(positions)} positions where every model has the end of a"
            " token, and at least 2 are needed. Add texts, in characters that all tokenizers know and keep"
        )


def _row(pair: Pair) -> list[str]:
    row = [pair.source.name, pair.target.name, pair.target.task, number(pair.exact)]
    for kinds in pair.estimates.values():
        shown = (kinds.get(kind) for kind in ("matched", "shuffled", "other_task"))
        row += ["-" if value is None else interval(value) for value in shown]
    return row


def _write(recipe: SimilarityRecipe, similarity: Similarity) -> None:
    data = {
        "trimtab": version("trimtab"),
        "recipe": recipe.model_dump(mode="json"),
        "positions": similarity.positions,
        "texts": similarity.texts,
        "texts_without_positions": similarity.texts_without,
        "pairs": [pair.plain() for pair in similarity.pairs],
    }
    text = json.dumps(data, indent=2, ensure_ascii=False)
    (recipe.output_dir / RESULTS).write_text(f"{text}\n", encoding="utf-8")
    (recipe.output_dir / TABLE).write_text(markdown(similarity.table), encoding="utf-8")
    (recipe.output_dir / PLOT).write_text(heat_maps(recipe.models, similarity.pairs), encoding="utf-8")
