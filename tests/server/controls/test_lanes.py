"""Threads that models share."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trimtab_server.controls.lanes import Lane


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - a thread changes it
        await asyncio.sleep(0.01)


class Gate:
    """Work that lasts until it is let go, and says that it ran."""

    def __init__(self, name: str, ran: list[str]) -> None:
        self.name, self.ran = name, ran
        self.opened = threading.Event()

    def __call__(self) -> str:
        self.ran.append(self.name)
        assert self.opened.wait(30)
        return self.name


def test_models_take_turns_whatever_one_of_them_asks_for():
    async def scenario() -> list[str]:
        ran: list[str] = []
        lane = Lane("test", 1)
        gates = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]
        running = []
        for model, name in gates:
            gate = Gate(name, ran)
            gate.opened.set()
            running.append(asyncio.ensure_future(lane.run(model, gate)))
        assert await asyncio.gather(*running) == [name for _, name in gates]
        return ran

    assert asyncio.run(scenario()) == ["a1", "a2", "b1", "c1", "a3", "b2"]


def test_no_more_run_at_once_than_there_are_threads():
    async def scenario() -> None:
        ran: list[str] = []
        lane = Lane("test", 2)
        gates = [Gate(name, ran) for name in "abc"]
        running = [asyncio.ensure_future(lane.run("m", gate)) for gate in gates]
        await until(lambda: len(ran) == 2)
        await settled()
        assert ran == ["a", "b"]
        for gate in gates:
            gate.opened.set()
        await asyncio.gather(*running)
        assert ran == ["a", "b", "c"]

    asyncio.run(scenario())


def test_who_leaves_while_waiting_costs_nothing():
    async def scenario() -> None:
        ran: list[str] = []
        lane = Lane("test", 1)
        first, gone, last = (Gate(name, ran) for name in ("first", "gone", "last"))
        running = [
            asyncio.ensure_future(lane.run(model, gate))
            for model, gate in (("m", first), ("n", gone), ("o", last))
        ]
        await settled()
        running[1].cancel()
        await settled()
        first.opened.set()
        last.opened.set()
        await asyncio.gather(running[0], running[2])
        assert running[1].cancelled()
        assert ran == ["first", "last"]

    asyncio.run(scenario())


def test_who_leaves_just_as_the_thread_becomes_free_holds_up_nobody():
    async def scenario() -> None:
        lane = Lane("test", 1)
        await lane._enter("m")
        gone, next_one = (asyncio.ensure_future(lane._enter("m")) for _ in range(2))
        await settled()
        gone.cancel()
        lane._leave()  # before the one that is cancelled has run
        await asyncio.wait_for(next_one, 10)
        assert gone.cancelled()
        lane._leave()
        assert await lane.run("m", lambda: 1) == 1

    asyncio.run(scenario())


def test_who_leaves_while_working_keeps_the_thread_until_the_work_has_ended():
    async def scenario() -> None:
        ran: list[str] = []
        lane = Lane("test", 1)
        gone, next_one = Gate("gone", ran), Gate("next", ran)
        leaving = asyncio.ensure_future(lane.run("m", gone))
        await until(lambda: ran)
        waiting = asyncio.ensure_future(lane.run("m", next_one))
        leaving.cancel()
        next_one.opened.set()
        await settled()
        assert ran == ["gone"]
        gone.opened.set()
        assert await waiting == "next"

    asyncio.run(scenario())


def test_work_that_fails_fails_for_who_asked_and_gives_its_thread_back():
    async def scenario() -> None:
        lane = Lane("test", 1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await lane.run("m", lambda: 1 // 0)
        assert await lane.run("m", lambda: 1) == 1

    asyncio.run(scenario())
