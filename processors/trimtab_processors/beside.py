"""The controls' forward beside the target's: both start from the tokens known before the step."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class Worker:
    """A thread with cores of its own that does one thing at a time; without cores, everything is done at
    once, by the caller.

    On a core that the engine uses too it would cost more than it saves.
    """

    def __init__(self, cpus: Collection[int] = ()) -> None:
        """Start the thread.

        Args:
            cpus: the numbers of its cores.

        Raises:
            ValueError: there are no such cores, or this process may not use them.
        """
        # torch keeps one number for all threads, which each takes over at its first use of it: both now
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trimtab") if cpus else None
        self._pending: Future[None] | None = None
        if self._pool:
            try:
                self._pool.submit(_settle_on, {*cpus}).result()
                torch.set_num_threads(threads)
            except (OSError, OverflowError) as error:
                raise ValueError(f"control_cpus {sorted(cpus)}: can't run there: {error}") from error

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, when what was begun before is done."""
        self.wait()
        if self._pool:
            self._pending = self._pool.submit(work)
        else:
            work()

    def wait(self) -> None:
        """Wait until what was begun is done; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _settle_on(cpus: Collection[int]) -> None:
    os.sched_setaffinity(0, cpus)  # 0: this thread
    torch.get_num_threads()
    torch.set_num_threads(len(cpus))
