"""The measures, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trimtab_training.similarity.compare import cosine, derangement, rank_correlation


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    left, right = rng.normal(scale=4, size=(2, 20, 12)).round()  # some values are equal
    return left, right + 0.5 * left


def test_a_cosine_by_hand():
    """Centred, they are (-1, 0, 1) and (-1, 1, 0)."""
    assert cosine(np.array([[4.0, 5, 6]]), np.array([[0.0, 2, 1]])) == pytest.approx([0.5])


def test_cosines_are_those_of_centred_rows(rows):
    expected = [stats.pearsonr(*pair).statistic for pair in zip(*rows, strict=True)]
    assert cosine(*rows) == pytest.approx(expected)


def test_rank_correlations_are_scipys_spearman(rows):
    expected = [stats.spearmanr(*pair).statistic for pair in zip(*rows, strict=True)]
    assert rank_correlation(*rows) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [cosine, rank_correlation])
def test_a_constant_and_a_factor_change_nothing(rows, measure):
    left, right = rows
    assert measure(left, 3 * right - 7) == pytest.approx(measure(left, right))


@pytest.mark.parametrize("measure", [cosine, rank_correlation])
def test_a_shift_without_direction_is_similar_to_nothing(measure):
    flat, other = np.full((1, 3), 0.1), np.array([[1.0, 2, 4]])
    assert measure(flat, other) == measure(other, flat) == [0.0]


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_moves_everything(count):
    moved = derangement(count, np.random.default_rng(1))
    assert sorted(moved) == list(range(count))
    assert all(moved != np.arange(count))
