"""Compares shifts across models: one is mapped into the other's vocabulary, position by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from trimtab_mappings import MappingTable, cached_table
from trimtab_processors.routing.pm_mined import PmMinedRouting
from trimtab_training.evaluation.bootstrap import Estimate, drawn_questions, estimate
from trimtab_training.similarity.positions import Position
from trimtab_training.similarity.recipe import ComparedModel, SimilarityRecipe
from trimtab_training.similarity.shifts import Reader, Shifts

Values = NDArray[np.float64]
_ROWS = 64  # positions whose mapped shifts, over a whole vocabulary, are in memory at a time


def cosine(left: Values, right: Values) -> Values:
    """Cosines of rows that are centred first, so that a constant in the logits cancels.

    A row whose values are all equal has no direction: its cosine is 0.

    Args:
        left: float64 [positions, tokens].
        right: float64 [positions, tokens].

    Returns:
        float64 [positions]
    """
    moves = (np.ptp(left, axis=1) > 0) & (np.ptp(right, axis=1) > 0)
    left, right = (each - each.mean(axis=1, keepdims=True) for each in (left, right))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.where(moves, (left * right).sum(axis=1) / np.where(moves, norms, 1.0), 0.0)


def rank_correlation(left: Values, right: Values) -> Values:
    """Spearman's rank correlation of rows; equal values share their mean rank. See `cosine`."""
    return cosine(stats.rankdata(left, axis=1), stats.rankdata(right, axis=1))


MEASURES = {"cosine": cosine, "rank_correlation": rank_correlation}


def derangement(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation that is a single cycle, so that it leaves nothing in its place."""
    order = rng.permutation(count)
    moved = np.empty(count, np.int64)
    moved[order] = np.roll(order, 1)
    return moved


@dataclass(frozen=True)
class Pair:
    """The similarity of two models: of the shift of `source`, mapped to `target`, and that of `target`."""

    source: ComparedModel
    target: ComparedModel
    exact: float
    """The share of compared tokens that both vocabularies have."""
    estimates: Mapping[str, Mapping[str, Estimate]]
    """By measure: `matched`, the nulls `shuffled` and `other_task`, and what `matched` is above each. A pair
    of different tasks has no `other_task`.
    """

    @property
    def same_task(self) -> bool:
        """Whether both were tuned on the same task."""
        return self.source.task == self.target.task

    def plain(self) -> dict[str, Any]:
        """The pair for JSON."""
        measures = {
            measure: {kind: value._asdict() for kind, value in kinds.items()}
            for measure, kinds in self.estimates.items()
        }
        ends = {"from": self.source.name, "to": self.target.name, "same_task": self.same_task}
        return {**ends, "exact": self.exact, **measures}


def compare(
    readers: Sequence[Reader],
    shifts: Sequence[Shifts],
    positions: Sequence[Position],
    recipe: SimilarityRecipe,
    rng: np.random.Generator,
) -> list[Pair]:
    """Compare all ordered pairs of models at `positions`."""
    shuffled = derangement(len(positions), rng)
    places = list(permutations(range(len(readers)), 2))
    tables = {
        (source, target): cached_table(
            readers[target].encoder, readers[source].encoder, recipe.tables.expanduser()
        )
        for source, target in places
    }
    scores = {
        (source, target): _scores(shifts[source], shifts[target], tables[source, target], shuffled)
        for source, target in places
    }
    models = recipe.models
    return [
        Pair(
            models[source],
            models[target],
            float(tables[source, target].exact[shifts[target].likeliest.numpy()].mean()),
            _estimates(
                scores[source, target],
                [scores[other, target] for other in _other_tasks(models, source, target)],
                np.array([position.passage for position in positions]),
                recipe,
            ),
        )
        for source, target in places
    ]


def _other_tasks(models: Sequence[ComparedModel], source: int, target: int) -> list[int]:
    """The models that are the null of a pair; none if the pair is such a null itself."""
    task = models[target].task
    if models[source].task != task:
        return []
    return [place for place, model in enumerate(models) if model.task != task]


def _scores(
    source: Shifts, target: Shifts, table: MappingTable, shuffled: NDArray[np.int64]
) -> dict[tuple[str, str], Values]:
    """Float64 [positions] for each measure, matched and shuffled."""
    known = np.where(table.mapping < source.values.shape[1], table.mapping, -1).astype(np.int32)
    routing = PmMinedRouting(known, target.values.shape[1])
    own = target.values.gather(1, target.likeliest).double().numpy()
    found = {}
    for kind, order in (("matched", np.arange(len(shuffled))), ("shuffled", shuffled)):
        chunks = [slice(start, start + _ROWS) for start in range(0, len(order), _ROWS)]
        mapped = torch.cat(
            [routing.routed(source.values[order[rows]]).gather(1, target.likeliest[rows]) for rows in chunks]
        )
        for measure, similarity in MEASURES.items():
            found[measure, kind] = similarity(mapped.double().numpy(), own)
    return found


def _estimates(
    scores: Mapping[tuple[str, str], Values],
    others: Sequence[Mapping[tuple[str, str], Values]],
    passages: NDArray[np.int64],
    recipe: SimilarityRecipe,
) -> dict[str, dict[str, Estimate]]:
    """Means over passages. Intervals draw passages, since positions of one passage are not independent."""
    counts = np.bincount(passages)
    draws, level = recipe.bootstrap.draws, recipe.bootstrap.level
    drawn = drawn_questions(int((counts > 0).sum()), draws, recipe.bootstrap.seed)

    def estimated(values: Values) -> Estimate:
        sums = np.bincount(passages, weights=values)
        return estimate(list(sums[counts > 0] / counts[counts > 0]), drawn, level)

    found: dict[str, dict[str, Estimate]] = {}
    for measure in MEASURES:
        matched = scores[measure, "matched"]
        nulls = {"shuffled": scores[measure, "shuffled"]}
        if others:
            nulls["other_task"] = np.mean([other[measure, "matched"] for other in others], axis=0)
        found[measure] = {"matched": estimated(matched)}
        found[measure] |= {kind: estimated(null) for kind, null in nulls.items()}
        found[measure] |= {f"above_{kind}": estimated(matched - null) for kind, null in nulls.items()}
    return found
