"""Progress of several tasks: bars on a terminal, and lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINES = 5


class Report(Protocol):
    """Take note of how far a task is."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Show the tasks that are reported until the block ends."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress)


def say(console: Console, line: str) -> None:
    """Print a line at once, without a break in it."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self._bars:
            self._bars[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._bars[task], completed=done)


class _Lines:
    """A line when a task begins, one after each fifth of it, and one when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, float] = {}
        self._shown: dict[str, int] = {}
        """Fifths that have been reported."""

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self._began:
            self._began[task] = time.monotonic()
            say(self._console, f"{task}: 0 of {total}")
        if done == total:
            say(self._console, f"{task}: done after {time.monotonic() - self._began[task]:.0f} s")
        elif (fifths := done * _LINES // total) > self._shown.get(task, 0):
            self._shown[task] = fifths
            say(self._console, f"{task}: {done} of {total}")
