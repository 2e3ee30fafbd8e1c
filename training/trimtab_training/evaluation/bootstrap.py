"""Means with intervals by the percentile bootstrap: questions are drawn again, with replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Key = TypeVar("Key")


class Estimate(NamedTuple):
    """A mean over questions, and the ends of its interval."""

    mean: float
    low: float
    high: float


def drawn_questions(count: int, draws: int, seed: int) -> NDArray[np.int64]:
    """int64 [draws, count]: of each draw, which of `count` questions it has."""
    return np.random.default_rng(seed).integers(0, count, (draws, count))


def estimate(values: Sequence[float], drawn: NDArray[np.int64], level: float) -> Estimate:
    """The mean of `values`, one for each question, and its interval of `level`."""
    array = np.asarray(values, dtype=np.float64)
    tail = (1 - level) / 2
    low, high = np.quantile(array[drawn].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(array.mean()), float(low), float(high))


def changes(
    values: Mapping[Key, Sequence[float]], base: Key, drawn: NDArray[np.int64], level: float
) -> dict[Key, Estimate]:
    """How far each mean is from that of `base`. Both are over the same drawn questions, so that questions
    which are hard for both do not widen the interval.
    """
    own = np.asarray(values[base], dtype=np.float64)
    return {key: estimate(list(np.asarray(each) - own), drawn, level) for key, each in values.items()}
