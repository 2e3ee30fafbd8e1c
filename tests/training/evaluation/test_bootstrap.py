"""Means and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from trimtab_training.evaluation.bootstrap import changes, drawn_questions, estimate


def test_the_interval_is_that_of_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).random(40)
    ours = estimate(values, drawn_questions(40, 20_000, seed=3), level=0.9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=4
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_a_seed_draws_the_same_questions_again():
    assert (drawn_questions(9, 5, seed=1) == drawn_questions(9, 5, seed=1)).all()
    assert (drawn_questions(9, 5, seed=1) != drawn_questions(9, 5, seed=2)).any()


def test_a_change_is_measured_on_the_same_questions():
    """Questions that are hard for both do not widen its interval."""
    values = {"off": [0.0, 1.0] * 20, "on": [0.5, 1.5] * 20}
    drawn = drawn_questions(40, 500, seed=0)
    assert changes(values, "off", drawn, 0.95) == {"off": (0, 0, 0), "on": (0.5, 0.5, 0.5)}
    assert estimate(values["on"], drawn, 0.95).low < 0.95


def test_all_answers_alike_leave_no_interval():
    assert estimate([1.0, 1.0], drawn_questions(2, 10, seed=0), 0.95) == (1, 1, 1)
