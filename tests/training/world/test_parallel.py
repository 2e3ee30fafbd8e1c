"""Tasks in processes of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from trimtab_training.world.parallel import run


def work(name: str, report) -> float:
    report(name, 1, 1)
    return float(torch.get_num_threads())


def fail(report) -> float:
    raise ValueError("the task's own message")


TASKS = {"last": partial(work, "last"), "first": partial(work, "first"), "other": partial(work, "other")}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_on_one_thread_and_in_its_order(jobs):
    """A task that needs another one starts after it, however many run at a time."""
    told = []
    results = run(TASKS, {"last": "first"}, lambda *report: told.append(report), jobs)
    assert results == {"first": 1.0, "other": 1.0, "last": 1.0}
    assert sorted(told) == [("first", 1, 1), ("last", 1, 1), ("other", 1, 1)]
    assert told.index(("first", 1, 1)) < told.index(("last", 1, 1))


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_error_ends_all(jobs):
    with pytest.raises(ValueError, match="the task's own message"):
        run({"bad": fail, **TASKS}, {"last": "first"}, lambda *_: None, jobs)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    run({"first": TASKS["first"]}, {}, lambda *_: None, jobs=1)
    assert torch.get_num_threads() == before
