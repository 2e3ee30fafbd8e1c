"""What runs beside the target's forward is done before anybody looks at it."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from trimtab_processors.beside import Worker

CPU = max(os.sched_getaffinity(0))


def test_without_cores_of_its_own_work_is_done_at_once_by_the_caller():
    done = []
    Worker().start(lambda: done.append(threading.current_thread()))
    assert done == [threading.current_thread()]


def test_with_cores_it_runs_there_and_the_caller_stays_where_it_is():
    before, seen = os.sched_getaffinity(0), []
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker = Worker([CPU])
        worker.start(
            lambda: seen.append(
                (threading.current_thread(), os.sched_getaffinity(0), torch.get_num_threads())
            )
        )
        worker.wait()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    ((thread, cpus, own_threads),) = seen
    assert own_threads == 1
    assert thread is not threading.current_thread()
    assert cpus == {CPU}
    assert os.sched_getaffinity(0) == before


def test_the_caller_goes_on_until_it_waits():
    worker, gate, done = Worker([CPU]), threading.Event(), []
    worker.start(lambda: done.append(gate.wait(30)))
    assert done == []
    gate.set()
    worker.wait()
    assert done == [True]


def test_work_begins_when_the_work_before_it_is_done():
    worker, order = Worker([CPU]), []
    for number in range(50):
        worker.start(lambda number=number: order.append(number))
    worker.wait()
    assert order == [*range(50)]


def test_an_error_reaches_the_one_who_waits_once():
    worker = Worker([CPU])
    worker.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.wait()
    worker.wait()


def test_cores_that_there_are_not_are_refused_by_number():
    with pytest.raises(ValueError, match=r"control_cpus \[100000\]: can't run there"):
        Worker([100000])
