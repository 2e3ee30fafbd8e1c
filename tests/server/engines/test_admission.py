"""The queue in front of a model."""

from __future__ import annotations

import asyncio

import pytest

from trimtab_server.engines.admission import AdmissionQueue
from trimtab_server.errors import RateLimitError


async def settle() -> None:
    """Let every task come as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Crowd:
    """Whoever goes through a queue, in their order."""

    def __init__(self, limit: int, places: int) -> None:
        self.queue = AdmissionQueue("m", limit, places)
        self.inside: list[int] = []
        self.tasks: list[asyncio.Task] = []

    async def come(self, number: int) -> asyncio.Task:
        async def enter() -> None:
            await self.queue.acquire()
            self.inside.append(number)

        task = asyncio.create_task(enter())
        self.tasks.append(task)
        await settle()
        return task


def crowded(limit: int, places: int):
    """Run a test with a crowd, in a loop of its own."""

    def run(test):
        def runs() -> None:
            asyncio.run(test(Crowd(limit, places)))

        runs.__name__ = test.__name__
        return runs

    return run


@crowded(limit=2, places=3)
async def test_so_many_enter_at_once_and_the_others_wait_in_their_order(crowd):
    for number in range(5):
        await crowd.come(number)
    assert crowd.inside == [0, 1]
    assert crowd.queue.queued == 3
    for left in range(3):
        crowd.queue.release()
        await settle()
        assert crowd.inside == list(range(3 + left))
    assert crowd.queue.queued == 0


@crowded(limit=1, places=1)
async def test_where_the_line_is_full_nobody_joins_it(crowd):
    await crowd.come(0)
    await crowd.come(1)
    with pytest.raises(RateLimitError, match="1 running, 1 queued"):
        await crowd.queue.acquire()
    assert crowd.queue.queued == 1


@crowded(limit=1, places=0)
async def test_without_places_nobody_waits(crowd):
    await crowd.come(0)
    with pytest.raises(RateLimitError):
        await crowd.queue.acquire()


@crowded(limit=1, places=3)
async def test_who_goes_away_leaves_the_line_to_the_others(crowd):
    await crowd.come(0)
    second, _ = await crowd.come(1), await crowd.come(2)
    second.cancel()
    await settle()
    assert crowd.queue.queued == 1
    crowd.queue.release()
    await settle()
    assert crowd.inside == [0, 2]


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_turn_is_not_lost_with_who_goes_away_as_it_comes(cancelled_first):
    @crowded(limit=1, places=3)
    async def run(crowd):
        await crowd.come(0)
        second, _ = await crowd.come(1), await crowd.come(2)
        steps = [second.cancel, crowd.queue.release]
        for step in steps if cancelled_first else reversed(steps):
            step()
        await settle()
        assert crowd.inside == [0, 2]
        crowd.queue.release()
        await crowd.come(3)
        assert crowd.inside == [0, 2, 3]

    run()
