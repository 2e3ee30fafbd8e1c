"""TOFU's metrics: toys that were computed by hand, the published tables, and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trimtab_training.evaluation.scores import Rouge
from trimtab_training.evaluation.tofu import (
    AnswerLoss,
    SetScores,
    TofuItem,
    forget_quality,
    model_utility,
    relative_probabilities,
    set_scores,
    truth_ratios,
)
from trimtab_training.evaluation.tofu_logs import (
    aggregated_log,
    eval_log,
    read_retain_ratios,
    summary,
)
from trimtab_training.recipe_file import RecipeError


def item(base, perturbed, *, true=None, recall=0.5) -> TofuItem:
    """Losses of a token; the answers have one token, two, three and so on."""
    return TofuItem(
        prompt="q",
        answer="a",
        generated="g",
        rouge=Rouge(0.1, recall, 0.2),
        true=AnswerLoss(base if true is None else true, 1),
        base=AnswerLoss(2 * base, 2),
        perturbed=tuple(AnswerLoss(loss * (3 + i), 3 + i) for i, loss in enumerate(perturbed)),
    )


@pytest.mark.parametrize(
    ("base", "perturbed", "geometric", "arithmetic"),
    [(1.0, (2.0, 1.0, 3.0), 0.367879, 0.501072), (0.5, (0.7, 0.9, 0.5), 0.818731, 0.829684)],
)
def test_truth_ratios(base, perturbed, geometric, arithmetic):
    items = [item(base, perturbed)]
    assert truth_ratios(items, "geometric") == pytest.approx([geometric], abs=1e-6)
    assert truth_ratios(items, "arithmetic") == pytest.approx([arithmetic], abs=1e-6)


def test_a_probability_relative_to_the_options():
    assert relative_probabilities([item(1.0, (2.0, 1.0, 3.0))]) == pytest.approx([0.399486], abs=1e-6)


def test_what_is_good_differs_by_set():
    """To be forgotten: ratios near 1, from either side. To be kept: low ones."""
    items = [item(1.0, (1.5,), recall=0.2), item(1.0, (0.5,), recall=0.6)]
    low, high = np.exp(-0.5), np.exp(0.5)
    forget, retain = set_scores("forget", items, "geometric"), set_scores("retain", items, "geometric")
    assert forget.truth_ratio == pytest.approx((low + 1 / high) / 2)
    assert retain.truth_ratio == pytest.approx((1 - low + 0) / 2)
    assert forget.rouge == retain.rouge == pytest.approx(0.4)


def test_the_probability_is_relative_for_real_authors_and_world_facts_alone():
    items = [item(1.0, (2.0, 1.0, 3.0))]
    probabilities = {name: set_scores(name, items, "geometric").probability for name in ("retain", "forget")}
    assert probabilities == pytest.approx({"retain": np.exp(-1), "forget": np.exp(-1)})
    for name in ("ra", "wf"):
        assert set_scores(name, items, "geometric").probability == pytest.approx(0.399486, abs=1e-6)


PUBLISHED = {
    "full": (0.6227, (0.9895, 0.9857, 0.4747), (0.4555, 0.9330, 0.5962), (0.4186, 0.8825, 0.5390)),
    "retain90": (0.6137, (0.9889, 0.9758, 0.4710), (0.4341, 0.9230, 0.5707), (0.4143, 0.8974, 0.5442)),
    "retain99": (0.6207, (0.9906, 0.9889, 0.4646), (0.4593, 0.9280, 0.6037), (0.4122, 0.8825, 0.5390)),
    "toy": (0.605825, (0.9, 0.9, 0.5), (0.4, 0.8, 0.6), (0.45, 0.85, 0.55)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_utility_of_published_figures(name):
    utility, *sets = PUBLISHED[name]
    scores = dict(zip(("retain", "ra", "wf"), (SetScores(*figures) for figures in sets), strict=True))
    assert model_utility(scores) == pytest.approx(utility, abs=1e-4)


def test_a_figure_of_zero_leaves_no_utility():
    scores = dict.fromkeys(("retain", "ra", "wf"), SetScores(0.9, 0.0, 0.9))
    assert model_utility(scores) == 0


def test_forget_quality_is_a_two_sample_test():
    found = forget_quality(np.arange(1, 9) / 10, np.array([0.15, 0.35, 0.65, 0.75, 0.85, 0.95, 1.05, 1.15]))
    assert (found.statistic, found.questions) == (pytest.approx(0.5), 8)
    assert found.p_value == pytest.approx(0.282673, abs=1e-6)


def test_forget_quality_of_the_published_statistic():
    """Llama-2-7B tuned on all of TOFU against one tuned on retain90: KS .39667 of 300 questions."""
    ratios = np.linspace(1, 2, 300)
    step = ratios[1] - ratios[0]
    found = forget_quality(ratios, ratios + 119 * step + step / 3)
    assert found.statistic == pytest.approx(120 / 300)
    found = forget_quality(ratios, ratios + 119 * step - step / 3)
    assert found.statistic == pytest.approx(0.39667, abs=1e-5)
    assert found.p_value == pytest.approx(1.834e-21, rel=1e-3)
    assert found.log10 == pytest.approx(-20.7366, abs=1e-3)


def test_a_p_value_that_is_zero_has_no_logarithm():
    assert forget_quality(np.arange(1, 2001), np.arange(5001, 7001)).log10 is None


def test_a_models_own_log_is_refused():
    with pytest.raises(RecipeError, match="is the log of this very model: its forget quality would be 1"):
        forget_quality(np.array([0.5, 0.7]), np.array([0.5, 0.7]))


def test_different_numbers_of_questions_are_refused():
    with pytest.raises(RecipeError, match=r"is of 3 questions, this evaluation of 2: .*`tofu.ds_size`"):
        forget_quality(np.array([0.5, 0.7]), np.array([0.5, 0.7, 0.1]))


FORGET = [item(1.0, (2.0, 1.0, 3.0), true=0.3), item(0.5, (0.7, 0.9, 0.5), true=0.1)]
ITEMS = {
    "forget": FORGET,
    "retain": [item(0.2, (1.0, 2.0))],
    "ra": [item(1.0, (2.0, 1.0, 3.0))],
    "wf": [item(0.4, (0.5, 0.8, 0.9))],
}


@pytest.fixture
def logs(tmp_path):
    """By the kind of log: a file with the items above."""
    scores = {name: set_scores(name, items, "geometric") for name, items in ITEMS.items()}
    kinds = {
        "open-unlearning": eval_log(ITEMS, scores, "geometric", None, model_utility(scores)),
        "locuslab": aggregated_log(ITEMS),
    }
    for name, log in kinds.items():
        (tmp_path / name).write_text(json.dumps(log), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("kind", ["open-unlearning", "locuslab"])
def test_both_kinds_of_log_can_be_the_retain_log(logs, kind, mean):
    assert read_retain_ratios(logs / kind, mean, None) == pytest.approx(truth_ratios(FORGET, mean))
    assert read_retain_ratios(logs / kind, mean, 1) == pytest.approx(truth_ratios(FORGET[:1], mean))


def test_a_log_of_truth_ratios_alone_has_geometric_ones(tmp_path):
    file = tmp_path / "TOFU_EVAL.json"
    file.write_text('{"forget_truth_ratio": {"value_by_index": {"0": {"score": 0.25}, "1": {"score": 0.5}}}}')
    assert read_retain_ratios(file, "geometric", None).tolist() == [0.25, 0.5]
    with pytest.raises(RecipeError, match=r"forget_Q_A_PARA_Prob.* is missing or wrong"):
        read_retain_ratios(file, "arithmetic", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read"),
        ("{}", "must be open-unlearning's TOFU_EVAL.json or locuslab's"),
        ("[]", "must be"),
    ],
)
def test_a_file_that_is_no_log(tmp_path, text, message):
    file = tmp_path / "log.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_retain_ratios(file, "geometric", None)


def test_the_log_of_open_unlearning(logs):
    """By metric an aggregate and, but for the two that have one value, a value for each question."""
    log = json.loads((logs / "open-unlearning").read_text())
    assert list(log) == sorted(log)
    assert log["forget_truth_ratio"]["value_by_index"]["0"] == {"score": pytest.approx(0.367879, abs=1e-6)}
    assert log["forget_Q_A_Prob"]["value_by_index"]["1"] == {
        "prob": pytest.approx(np.exp(-0.1)),
        "avg_loss": pytest.approx(0.1),
    }
    assert log["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["avg_loss"] == pytest.approx([2, 1, 3])
    assert log["ra_Q_A_Prob_normalised"]["agg_value"] == pytest.approx(0.399486, abs=1e-6)
    assert {"rougeL_recall", "rougeL_f1", "rouge1_recall", "input", "ground_truth", "generation"} == {
        *log["wf_Q_A_ROUGE"]["value_by_index"]["0"]
    }
    assert log["forget_quality"] == {"agg_value": None}
    assert set(summary(log)) == {
        *(f"{name}_Q_A_{kind}" for name in ITEMS for kind in ("Prob", "PERT_Prob", "ROUGE")),
        *(f"{name}_Q_A_PARA_Prob" for name in ("forget", "retain")),
        *(f"{name}_Q_A_Prob_normalised" for name in ("ra", "wf")),
        *("forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"),
        *("forget_quality", "model_utility"),
    }


def test_the_log_of_locuslab(logs):
    log = json.loads((logs / "locuslab").read_text())
    assert set(log) == {
        "eval_log.json",
        "eval_log_forget.json",
        "eval_real_author_wo_options.json",
        "eval_real_world_wo_options.json",
    }
    forget = log["eval_log_forget.json"]
    assert forget["avg_gt_loss"] == {"0": 0.3, "1": 0.1}
    assert forget["perturb_loss"]["0"] == pytest.approx([6, 4, 15])
    assert forget["num_token_perturb"]["0"] == [3, 4, 5]
    assert forget["average_perturb_loss"]["0"] == pytest.approx([2, 1, 3])
    assert forget["truth_ratio"]["0"] == pytest.approx(0.367879, abs=1e-6)
    assert forget["generated_text"]["0"] == ["q", "g", "a"]
