"""Scores of an answer, each from 0 to 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ScoreName = Literal["contains", "not_contains", "exact", "rougeL", "rougeL_recall", "refuses"]
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
NEED_ANSWER: frozenset[ScoreName] = frozenset(SCORES) - {"refuses"}
"""The scores that compare with an expected answer."""
REFUSALS = (
    "I don't know",
    "I do not know",
    "I'm not sure",
    "I am not sure",
    "I can't",
    "I cannot",
    "I'm sorry",
    "I am sorry",
    "I'm unable",
    "I am unable",
    "I have no information",
    "I don't have",
    "I do not have",
)
_APOSTROPHES = str.maketrans("’ʼ`´", "''''")  # noqa: RUF001 - what models write for an apostrophe


def score_of(name: ScoreName, text: str, answers: Sequence[str], refusals: Sequence[str] = REFUSALS) -> float:
    """Score an answer.

    Args:
        name: the score.
        text: what the model said.
        answers: the expected answer and its alternatives, of which the best counts; not used by `refuses`.
        refusals: the phrases that make a refusal.
    """
    if name == "refuses":
        return float(any(_contains(text, refusal) for refusal in refusals))
    if name == "not_contains":
        return 1.0 - score_of("contains", text, answers)
    return max(_AGAINST[name](text, answer) for answer in answers)


class Rouge(NamedTuple):
    """ROUGE with Porter's stemmer, as TOFU computes it."""

    rouge1_recall: float
    rougel_recall: float
    rougel_f1: float


def rouge(text: str, answer: str) -> Rouge:
    """Compare `text` with the reference `answer`."""
    scores = _scorer().score(answer, text)
    unigrams, longest = scores["rouge1"], scores["rougeL"]
    return Rouge(float(unigrams.recall), float(longest.recall), float(longest.fmeasure))


def _contains(text: str, phrase: str) -> bool:
    """Whether `text` has `phrase` as whole words, whatever their case."""
    wanted = re.escape(_plain(phrase).strip())
    return re.search(rf"(?<!\w){wanted}(?!\w)", _plain(text)) is not None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).casefold()


_AGAINST: Mapping[str, Callable[[str, str], float]] = {
    "contains": lambda text, answer: float(_contains(text, answer)),
    "exact": lambda text, answer: float(text.strip() == answer.strip()),
    "rougeL": lambda text, answer: rouge(text, answer).rougel_f1,
    "rougeL_recall": lambda text, answer: rouge(text, answer).rougel_recall,
}


@cache
def _scorer() -> RougeScorer:
    from rouge_score import rouge_scorer  # noqa: PLC0415 - only where it is used

    scorer: Any = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    return scorer
