"""TOFU's files: open-unlearning's `TOFU_EVAL.json` and `TOFU_SUMMARY.json`, and locuslab's aggregated log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_training.evaluation.tofu import (
    WITH_OPTIONS,
    ForgetQuality,
    Mean,
    SetName,
    SetScores,
    TofuItem,
    probabilities,
    ratios_of_losses,
    relative_probabilities,
    truth_ratios,
)
from trimtab_training.recipe_file import RecipeError

EVAL, SUMMARY, AGGREGATED = "TOFU_EVAL.json", "TOFU_SUMMARY.json", "eval_log_aggregated.json"
_LOCUSLAB_FILES: Mapping[SetName, str] = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
}
_FORGET_LOG = _LOCUSLAB_FILES["forget"]

Items = Mapping[SetName, Sequence[TofuItem]]


def eval_log(
    items: Items,
    scores: Mapping[SetName, SetScores],
    mean: Mean,
    quality: ForgetQuality | None,
    utility: float | None,
) -> dict[str, Any]:
    """The content of `TOFU_EVAL.json`: by metric `agg_value` and, where there is one, `value_by_index`."""
    log: dict[str, Any] = {}
    for name, of_set in items.items():
        log |= _metrics_of(name, of_set, scores[name], mean)
    log["forget_quality"] = {"agg_value": None if quality is None else quality.p_value}
    log["model_utility"] = {"agg_value": utility}
    return dict(sorted(log.items()))


def summary(log: Mapping[str, Any]) -> dict[str, float | None]:
    """The content of `TOFU_SUMMARY.json`. Without a retain log, forget quality is null."""
    return {name: metric["agg_value"] for name, metric in log.items()}


def _metrics_of(name: SetName, items: Sequence[TofuItem], scores: SetScores, mean: Mean) -> dict[str, Any]:
    probs = probabilities(items)
    metrics = {
        f"{name}_Q_A_Prob": _metric(float(probs.mean()), [_prob([item.true.mean])[0] for item in items]),
        f"{name}_Q_A_PERT_Prob": _metric(
            float(np.mean([np.exp(-loss.mean) for item in items for loss in item.perturbed])),
            [_listed(_prob([loss.mean for loss in item.perturbed])) for item in items],
        ),
        f"{name}_Q_A_ROUGE": _metric(scores.rouge, [_rouge(item) for item in items]),
        truth_ratio_key(name): _metric(
            scores.truth_ratio, [{"score": float(ratio)} for ratio in truth_ratios(items, mean)]
        ),
    }
    if name in WITH_OPTIONS:
        relative = relative_probabilities(items)
        metrics[f"{name}_Q_A_Prob_normalised"] = _metric(
            scores.probability, [{"prob": float(each)} for each in relative]
        )
    else:
        base = [item.base.mean for item in items]
        metrics[f"{name}_Q_A_PARA_Prob"] = _metric(float(np.exp(-np.array(base)).mean()), _prob(base))
    return metrics


def truth_ratio_key(name: SetName) -> str:
    """What open-unlearning calls the truth ratio of a set."""
    return "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"


def _metric(aggregate: float, values: Sequence[Any]) -> dict[str, Any]:
    return {"agg_value": aggregate, "value_by_index": {str(place): each for place, each in enumerate(values)}}


def _prob(losses: Sequence[float]) -> list[dict[str, float]]:
    return [{"prob": float(np.exp(-loss)), "avg_loss": loss} for loss in losses]


def _listed(values: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [value[key] for value in values] for key in values[0]}


def _rouge(item: TofuItem) -> dict[str, Any]:
    return {
        "rouge1_recall": item.rouge.rouge1_recall,
        "rougeL_f1": item.rouge.rougel_f1,
        "rougeL_recall": item.rouge.rougel_recall,
        "input": item.prompt,
        "ground_truth": item.answer,
        "generation": item.generated,
    }


def aggregated_log(items: Items) -> dict[str, Any]:
    """The content of locuslab's `eval_log_aggregated.json`: by file of a set, by statistic, by index."""
    return {_LOCUSLAB_FILES[name]: _statistics(of_set) for name, of_set in items.items()}


def _statistics(items: Sequence[TofuItem]) -> dict[str, dict[str, Any]]:
    ratios = ratios_of_losses(
        np.array([item.base.mean for item in items]),
        [np.array([loss.mean for loss in item.perturbed]) for item in items],
        "geometric",
    )
    rows = [
        {
            "avg_gt_loss": item.true.mean,
            "gt_loss": item.true.total,
            "num_token_gt": item.true.tokens,
            "generated_text": [item.prompt, item.generated, item.answer],
            "rouge1_recall": item.rouge.rouge1_recall,
            "rougeL_recall": item.rouge.rougel_recall,
            "average_perturb_loss": [loss.mean for loss in item.perturbed],
            "avg_paraphrased_loss": item.base.mean,
            "truth_ratio": float(ratio),
            "paraphrased_loss": item.base.total,
            "perturb_loss": [loss.total for loss in item.perturbed],
            "num_token_paraphrased": item.base.tokens,
            "num_token_perturb": [loss.tokens for loss in item.perturbed],
        }
        for item, ratio in zip(items, ratios, strict=True)
    ]
    return {key: {str(place): row[key] for place, row in enumerate(rows)} for key in rows[0]}


def read_retain_ratios(path: Path, mean: Mean, ds_size: int | None) -> NDArray[np.float64]:
    """The truth ratios on the forget set in a retain model's log, of either kind.

    Args:
        path: a `TOFU_EVAL.json` or an `eval_log_aggregated.json`.
        mean: how the probabilities of perturbed answers are averaged.
        ds_size: only the first so many questions; None: all.

    Raises:
        RecipeError: the log can't be read, or is of another kind.
    """
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"`tofu.retain_logs_path`: {path} can't be read: {error}") from error
    try:
        ratios = _ratios(log, mean)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"`tofu.retain_logs_path`: {path} must be open-unlearning's {EVAL} or locuslab's {AGGREGATED},"
            f" with losses on the forget set; in it {error!r} is missing or wrong"
        ) from error
    return ratios[:ds_size]


def _ratios(log: Mapping[str, Any], mean: Mean) -> NDArray[np.float64]:
    if _FORGET_LOG in log:
        base = list(log[_FORGET_LOG]["avg_paraphrased_loss"].values())
        perturbed = list(log[_FORGET_LOG]["average_perturb_loss"].values())
    elif "forget_Q_A_PERT_Prob" in log or mean == "arithmetic":
        base = [each["avg_loss"] for each in log["forget_Q_A_PARA_Prob"]["value_by_index"].values()]
        perturbed = [each["avg_loss"] for each in log["forget_Q_A_PERT_Prob"]["value_by_index"].values()]
    else:
        scores = log[truth_ratio_key("forget")]["value_by_index"].values()
        return np.array([each["score"] for each in scores], dtype=np.float64)
    return ratios_of_losses(np.array(base), [np.array(each) for each in perturbed], mean)
