"""Scores of answers, held against rouge-score where that defines them."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from trimtab_training.evaluation.scores import SCORES, score_of


@pytest.mark.parametrize(
    ("name", "text", "answers", "expected"),
    [
        ("contains", "It is Paris, of course.", ["Paris"], 1),
        ("contains", "It is PARIS.", ["Paris"], 1),
        ("contains", "A Parisian.", ["Paris"], 0),
        ("contains", "Bern, or Lyon.", ["Rome", "Lyon"], 1),
        ("contains", "washington d.c.", ["Washington D.C."], 1),
        ("not_contains", "A Parisian.", ["Paris"], 1),
        ("not_contains", "Bern, or Lyon.", ["Rome", "Lyon"], 0),
        ("exact", " Paris\n", ["Paris"], 1),
        ("exact", "Paris.", ["Paris"], 0),
        ("exact", "paris", ["Paris"], 0),
        ("refuses", "Sorry, I don\u2019t know.", [], 1),
        ("refuses", "I DO NOT KNOW", [], 1),
        ("refuses", "I know: Paris.", [], 0),
    ],
)
def test_what_counts(name, text, answers, expected):
    assert score_of(name, text, answers) == expected


def test_refusals_can_be_ones_own():
    assert score_of("refuses", "No comment.", [], ["no comment"]) == 1
    assert score_of("refuses", "I don't know.", [], ["no comment"]) == 0


@pytest.mark.parametrize(("name", "measure"), [("rougeL_recall", "recall"), ("rougeL", "fmeasure")])
def test_rouge_is_that_of_rouge_score_with_a_stemmer(name, measure):
    text, answers = "The capitals of France were Paris.", ["The capital of France is Paris", "Lyon"]
    scores = [RougeScorer(["rougeL"], use_stemmer=True).score(each, text)["rougeL"] for each in answers]
    best = max(getattr(score, measure) for score in scores)
    assert score_of(name, text, answers) == pytest.approx(best)
    assert 0 < best < 1


def test_every_score_is_a_share():
    for name in SCORES:
        assert 0 <= score_of(name, "I don't know Paris", ["Paris"]) <= 1
