"""Runs TOFU on a target under a control, and writes its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.offline import Offline
from trimtab_training.evaluation.recipe import Question, TofuSettings
from trimtab_training.evaluation.scores import rouge
from trimtab_training.evaluation.teacher_forced import GivenAnswer, TeacherForced, TokenScore
from trimtab_training.evaluation.tofu import (
    AnswerLoss,
    ForgetQuality,
    SetName,
    SetScores,
    TofuItem,
    forget_quality,
    model_utility,
    require_as_many,
    set_scores,
    truth_ratios,
)
from trimtab_training.evaluation.tofu_logs import (
    AGGREGATED,
    EVAL,
    SUMMARY,
    aggregated_log,
    eval_log,
    read_retain_ratios,
    summary,
)
from trimtab_training.recipe_file import RecipeError

_FILES: dict[SetName, str] = {
    "forget": "{forget_split}_perturbed.json",
    "retain": "retain_perturbed.json",
    "ra": "real_authors_perturbed.json",
    "wf": "world_facts_perturbed.json",
}


@dataclass(frozen=True)
class TofuRecord:
    """A question with its true, base and perturbed answers."""

    question: Question
    answer: str
    base: str
    perturbed: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """Those whose likelihood is wanted."""
        return (self.answer, self.base, *self.perturbed)


@dataclass(frozen=True)
class TofuResult:
    """What TOFU says of a target under one setting."""

    setting: Setting
    items: dict[SetName, list[TofuItem]]
    scores: dict[SetName, SetScores]
    utility: float
    quality: ForgetQuality | None
    refused: str = field(default="")
    """Why there is no forget quality although there is a retain log."""

    def plain(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        quality = self.quality
        tested = None if quality is None else {**quality._asdict(), "log10_p_value": quality.log10}
        return {
            **self.setting._asdict(),
            "model_utility": self.utility,
            "forget_quality": tested,
            "sets": {name: scores._asdict() for name, scores in self.scores.items()},
        }


@dataclass(frozen=True)
class TofuData:
    """What is read before anything is computed, so that faults are found first."""

    records: dict[SetName, list[TofuRecord]]
    retain_ratios: NDArray[np.float64] | None

    @property
    def count(self) -> int:
        """Number of answers to generate and of answers to score."""
        return sum(1 + len(record.answers) for records in self.records.values() for record in records)


def load_tofu(settings: TofuSettings) -> TofuData:
    """Read the four sets, and the retain log if there is one.

    Raises:
        RecipeError: a file is missing or wrong, or the retain log is of another number of questions.
    """
    records = {
        name: load_records(settings.path / file.format(forget_split=settings.forget_split), name, settings)
        for name, file in _FILES.items()
    }
    ratios = None
    if settings.retain_logs_path is not None:
        ratios = read_retain_ratios(settings.retain_logs_path, settings.truth_ratio, settings.ds_size)
        require_as_many(len(records["forget"]), len(ratios))
    return TofuData(records, ratios)


def load_records(path: Path, name: SetName, settings: TofuSettings) -> list[TofuRecord]:
    """The records of a set, a file of JSON Lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"`tofu.path`: {path} can't be read: {error}") from error
    key = settings.question_key if name in ("forget", "retain") else "question"
    numbered = list(enumerate(filter(str.strip, lines), start=1))[: settings.ds_size]
    if not numbered:
        raise RecipeError(f"`tofu.path`: {path} has no records")
    return [_record(line, f"{path}, record {number}", key) for number, line in numbered]


def _record(line: str, place: str, key: str) -> TofuRecord:
    try:
        record: dict[str, Any] = json.loads(line)
        answer, perturbed = record["answer"], tuple(record["perturbed_answer"])
        base = record.get("paraphrased_answer", answer)
        question = Question(question=record[key])
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"`tofu.path`: {place} is not a record of TOFU: {error}") from error
    except KeyError as error:
        raise RecipeError(f"`tofu.path`: {place} has no {error}") from error
    if not perturbed:
        raise RecipeError(f"`tofu.path`: {place} has no perturbed answers")
    return TofuRecord(question, answer, base, perturbed)


def run_tofu(
    data: TofuData, settings: TofuSettings, asker: Offline, under: Sequence[Setting]
) -> list[TofuResult]:
    """Evaluate a target under each of `under`.

    Args:
        data: from `load_tofu`.
        settings: what was asked for.
        asker: the target and the control; answers of `settings.max_new_tokens` are generated.
        under: the settings of the control.
    """
    asker = replace(asker, max_new_tokens=settings.max_new_tokens, stop=())
    items = {name: _measure(records, settings, asker, under) for name, records in data.records.items()}
    return [
        _result(setting, {name: of_set[place] for name, of_set in items.items()}, data, settings)
        for place, setting in enumerate(under)
    ]


def _measure(
    records: Sequence[TofuRecord], settings: TofuSettings, asker: Offline, under: Sequence[Setting]
) -> list[list[TofuItem]]:
    """The items of a set: [settings][records]."""
    texts = asker.answers([record.question for record in records], under)
    losses = _losses(records, settings, asker, under)
    return [
        [_item(*each) for each in zip(records, said, lost, strict=True)]
        for said, lost in zip(texts, losses, strict=True)
    ]


def _losses(
    records: Sequence[TofuRecord], settings: TofuSettings, asker: Offline, under: Sequence[Setting]
) -> list[list[list[AnswerLoss]]]:
    """The losses of all answers: [settings][records][answers]."""
    given = [
        _given(record.question, settings.answer_tag + text, asker)
        for record in records
        for text in record.answers
    ]
    scorer = TeacherForced(asker.target, asker.control)
    found: list[list[AnswerLoss | None]] = [[None] * len(given) for _ in under]
    for places, scored in scorer.scores(given, under):
        for of_setting, of_batch in zip(found, scored, strict=True):
            for place, tokens in zip(places, of_batch, strict=True):
                of_setting[place] = _loss(tokens)
        asker.progress(len(places) * len(under))
    return [_by_record(records, [each for each in row if each is not None]) for row in found]


def _given(question: Question, answer: str, asker: Offline) -> GivenAnswer:
    encoded = asker.target.encode_with_answer(question, answer, asker.system_prompt)
    own = asker.control.encode(question.chat(asker.system_prompt)) if asker.control else None
    return GivenAnswer(*encoded, own)


def _loss(tokens: Sequence[TokenScore]) -> AnswerLoss:
    return AnswerLoss(-sum(token.log_prob for token in tokens), len(tokens))


def _by_record(records: Sequence[TofuRecord], losses: Sequence[AnswerLoss]) -> list[list[AnswerLoss]]:
    rest = iter(losses)
    return [[next(rest) for _ in record.answers] for record in records]


def _item(record: TofuRecord, text: str, losses: Sequence[AnswerLoss]) -> TofuItem:
    true, base, *perturbed = losses
    said = text.strip()
    return TofuItem(
        prompt=record.question.text,
        answer=record.answer,
        generated=said,
        rouge=rouge(said, record.answer),
        true=true,
        base=base,
        perturbed=tuple(perturbed),
    )


def _result(
    setting: Setting, items: dict[SetName, list[TofuItem]], data: TofuData, settings: TofuSettings
) -> TofuResult:
    mean = settings.truth_ratio
    scores = {name: set_scores(name, of_set, mean) for name, of_set in items.items()}
    quality, refused = None, ""
    if data.retain_ratios is not None:
        try:
            quality = forget_quality(truth_ratios(items["forget"], mean), data.retain_ratios)
        except RecipeError as error:  # what was measured is written all the same
            refused = str(error)
    return TofuResult(setting, items, scores, model_utility(scores), quality, refused)


def write_tofu(directory: Path, results: Sequence[TofuResult], settings: TofuSettings) -> None:
    """Write the three files of each setting into a directory of its own."""
    for result in results:
        place = directory / "tofu" / directory_name(result.setting)
        place.mkdir(parents=True, exist_ok=True)
        log = eval_log(result.items, result.scores, settings.truth_ratio, result.quality, result.utility)
        for name, content in (
            (EVAL, log),
            (SUMMARY, summary(log)),
            (AGGREGATED, aggregated_log(result.items)),
        ):
            (place / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def directory_name(setting: Setting) -> str:
    """`strength-0`, `strength-1.5-path`."""
    return "-".join(["strength", f"{setting.strength:g}", *([setting.routing] if setting.routing else [])])


def tofu_table(results: Sequence[TofuResult]) -> tuple[list[str], list[list[str]]]:
    """A header and rows: forget quality, model utility, and the figures of each set."""
    header = ["strength", "routing", "log10 p", "KS", "n", "utility"]
    header += [f"{name} {figure}" for name in _FILES for figure in ("P", "ROUGE", "TR")]
    return header, [_row(result) for result in results]


def _row(result: TofuResult) -> list[str]:
    quality = result.quality
    tested = [_logarithm(quality), f"{quality.statistic:.3f}"] if quality else ["-", "-"]
    figures = [f"{value:.3f}" for name in _FILES for value in result.scores[name]]
    count = str(len(result.items["forget"]))
    setting = [f"{result.setting.strength:g}", result.setting.routing or "-"]
    return [*setting, *tested, count, f"{result.utility:.3f}", *figures]


def _logarithm(quality: ForgetQuality) -> str:
    return "-inf" if quality.log10 is None else f"{quality.log10:.2f}"
