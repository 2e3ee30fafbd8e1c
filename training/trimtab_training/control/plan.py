"""Which records a step takes, and at which strength: a function of the seed and the step's number alone.

So a run that continues from a checkpoint takes the records that it would have taken without the break, and
every process of a distributed run knows what the others take.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

_KEPT_EPOCHS = 64


class Plan:
    """Takes the records of every data set in a new random order in each pass over it."""

    def __init__(self, sizes: Sequence[int], batch_sizes: Sequence[int], seed: int) -> None:
        """Args: the number of records of each data set, and how many of them a step takes."""
        self._sizes = sizes
        self._batch_sizes = batch_sizes
        self._seed = seed
        self._order = lru_cache(maxsize=_KEPT_EPOCHS)(self._shuffled)

    def records(self, data_set: int, step: int) -> list[int]:
        """The places of the records of a data set that `step`, counted from 0, takes."""
        size, count = self._sizes[data_set], self._batch_sizes[data_set]
        places = range(step * count, (step + 1) * count)
        return [self._order(data_set, place // size)[place % size] for place in places]

    def steps(self, epochs: float) -> int:
        """The steps of that many passes over the first data set."""
        return ceil(epochs * self._sizes[0] / self._batch_sizes[0])

    def epoch(self, step: int) -> float:
        """The passes over the first data set that are done after `step` steps."""
        return step * self._batch_sizes[0] / self._sizes[0]

    def strength(self, step: int, lowest: float, highest: float) -> float:
        return random.Random(f"strength {self._seed} {step}").uniform(lowest, highest)

    def _shuffled(self, data_set: int, epoch: int) -> list[int]:
        order = list(range(self._sizes[data_set]))
        random.Random(f"order {self._seed} {data_set} {epoch}").shuffle(order)
        return order
