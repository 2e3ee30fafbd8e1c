"""Tasks side by side, each in its own process and on one thread: results do not depend on the cores."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from trimtab_training.world.world import Report

Task = Callable[[Report], float]

_POLL_SECONDS = 0.1
_reports: Any = None
"""In a worker: the queue that takes its reports to the parent."""


def run(
    tasks: Mapping[str, Task], after: Mapping[str, str], report: Report, jobs: int | None = None
) -> dict[str, float]:
    """Run all tasks, in their order as far as there are free workers; the first error ends all of them.

    Args:
        tasks: by name; they must be picklable unless `jobs` is 1.
        after: for a task, another one that must be done before it starts.
        report: called in this process.
        jobs: how many at a time; None: one a core. 1: in this process.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    if jobs == 1:
        with _one_thread():
            return {name: tasks[name](report) for name in _in_order(tasks, after)}
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    with context.Pool(jobs, _start_worker, (reports,)) as pool:
        return _Schedule(pool, tasks, after, report, reports).run()


class _Schedule:
    def __init__(
        self, pool: Pool, tasks: Mapping[str, Task], after: Mapping[str, str], report: Report, reports: Any
    ) -> None:
        self._pool = pool
        self._waiting = dict(tasks)
        self._after = after
        self._report = report
        self._reports = reports
        self._running: dict[str, AsyncResult[float]] = {}
        self._done: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        while self._waiting or self._running:
            self._start()
            self._pass_on_reports()
            self._collect()
        self._pass_on_reports()
        return self._done

    def _start(self) -> None:
        for name in [n for n in self._waiting if self._after.get(n, n) in {n, *self._done}]:
            self._running[name] = self._pool.apply_async(_work, (self._waiting.pop(name),))

    def _pass_on_reports(self) -> None:
        try:
            while True:
                self._report(*self._reports.get(timeout=_POLL_SECONDS))
        except queue.Empty:
            return

    def _collect(self) -> None:
        for name in [name for name, result in self._running.items() if result.ready()]:
            self._done[name] = self._running.pop(name).get()


def _in_order(tasks: Mapping[str, Task], after: Mapping[str, str]) -> list[str]:
    return sorted(tasks, key=lambda name: name in after)


def _start_worker(reports: Any) -> None:
    """An interrupt from the keyboard is the parent's to handle, which then ends its workers."""
    global _reports  # noqa: PLW0603 - a pool hands a queue to its workers only at their start
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def _work(task: Task) -> float:
    return task(lambda *report: _reports.put(report))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
