"""TOFU's metrics, as open-unlearning computes them (Maini et al., 2024, arXiv 2401.06121).

A loss L is the mean cross entropy over an answer's tokens, end of text included; the probability of an answer
is P = exp(-L). A question has a true answer, a *base* answer (its paraphrase, or the true answer if there is
none), and perturbed ones, which are wrong. The truth ratio is the mean of P over the perturbed answers
divided by P of the base answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trimtab_training.evaluation.scores import Rouge
from trimtab_training.recipe_file import RecipeError

Mean = Literal["geometric", "arithmetic"]
"""How the probabilities of perturbed answers are averaged in a truth ratio."""
SetName = Literal["forget", "retain", "ra", "wf"]
"""The forget set, the retain set, real authors, world facts."""
WITH_OPTIONS: frozenset[SetName] = frozenset({"ra", "wf"})
"""The sets whose probability is relative to the perturbed answers."""
UTILITY: tuple[SetName, ...] = ("retain", "ra", "wf")
_EPSILON = 1e-10  # open-unlearning's


class AnswerLoss(NamedTuple):
    """The cross entropy of an answer."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """The loss of a token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class TofuItem:
    """What was measured for one question."""

    prompt: str
    answer: str
    generated: str
    rouge: Rouge
    true: AnswerLoss
    base: AnswerLoss
    perturbed: tuple[AnswerLoss, ...]


class SetScores(NamedTuple):
    """The three figures of a set."""

    probability: float
    rouge: float
    truth_ratio: float


class ForgetQuality(NamedTuple):
    """The two-sample Kolmogorov-Smirnov test of truth ratios against those of a retain model."""

    p_value: float
    statistic: float
    questions: int

    @property
    def log10(self) -> float | None:
        """The logarithm of the p-value; None if that is too small to be told from 0."""
        return float(np.log10(self.p_value)) if self.p_value else None


def set_scores(name: SetName, items: Sequence[TofuItem], mean: Mean) -> SetScores:
    """The figures of a set."""
    ratios = truth_ratios(items, mean)
    if name == "forget":
        ratio = np.minimum(ratios, 1 / (ratios + _EPSILON)).mean()
    else:
        ratio = np.maximum(0, 1 - ratios).mean()
    probability = relative_probabilities(items) if name in WITH_OPTIONS else probabilities(items)
    rouge = np.mean([item.rouge.rougel_recall for item in items])
    return SetScores(float(probability.mean()), float(rouge), float(ratio))


def probabilities(items: Sequence[TofuItem]) -> NDArray[np.float64]:
    """float64 [items]: P of the true answers."""
    return np.exp([-item.true.mean for item in items])


def relative_probabilities(items: Sequence[TofuItem]) -> NDArray[np.float64]:
    """float64 [items]: P of the true answers, divided by the sum of it and those of the perturbed ones."""
    wrong = np.array([sum(np.exp(-loss.mean) for loss in item.perturbed) for item in items])
    true = probabilities(items)
    relative: NDArray[np.float64] = true / (true + wrong + _EPSILON)
    return relative


def truth_ratios(items: Sequence[TofuItem], mean: Mean) -> NDArray[np.float64]:
    """float64 [items]."""
    base = np.array([item.base.mean for item in items])
    perturbed = [np.array([loss.mean for loss in item.perturbed]) for item in items]
    return ratios_of_losses(base, perturbed, mean)


def ratios_of_losses(
    base: NDArray[np.float64], perturbed: Sequence[NDArray[np.float64]], mean: Mean
) -> NDArray[np.float64]:
    """Truth ratios.

    Args:
        base: float64 [items], mean losses of the base answers.
        perturbed: for each item float64 [its perturbed answers], their mean losses.
        mean: how the probabilities of perturbed answers are averaged.
    """
    if mean == "geometric":
        wrong = np.array([np.exp(-losses.mean()) for losses in perturbed])
    else:
        wrong = np.array([np.exp(-losses).mean() for losses in perturbed])
    ratios: NDArray[np.float64] = wrong / (np.exp(-base) + _EPSILON)
    return ratios


def model_utility(scores: Mapping[SetName, SetScores]) -> float:
    """The harmonic mean of the nine figures of the retain set, real authors and world facts."""
    return float(stats.hmean([value for name in UTILITY for value in scores[name]]))


def forget_quality(model: NDArray[np.float64], retain: NDArray[np.float64]) -> ForgetQuality:
    """Compare truth ratios on the forget set with those of a model that never saw it.

    Raises:
        RecipeError: both are of the same model, or of different numbers of questions.
    """
    require_as_many(len(model), len(retain))
    if np.allclose(model, retain, rtol=1e-12, atol=0):
        raise RecipeError(
            "`tofu.retain_logs_path` is the log of this very model: its forget quality would be 1 by"
            " construction. Take the log of a model that was trained without the forget set"
        )
    test = stats.ks_2samp(1 / (model + _EPSILON), 1 / (retain + _EPSILON))
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(model))


def require_as_many(model: int, retain: int) -> None:
    """Refuse to compare different numbers of questions: the p-values would not be comparable with others'.

    Raises:
        RecipeError: the numbers differ.
    """
    if model != retain:
        raise RecipeError(
            f"`tofu.retain_logs_path` is of {retain} questions, this evaluation of {model}: the p-values of"
            " different numbers are not comparable. Set `tofu.ds_size` to the smaller number"
        )
