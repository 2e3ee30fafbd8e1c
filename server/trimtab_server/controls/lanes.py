"""Threads for work that would hold up the event loop: bounded, and shared fairly between models."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Lane:
    """`threads` threads, which take the models that have work in turn, and each model's work in its order."""

    def __init__(self, name: str, threads: int) -> None:
        self._free = threads
        self._executor = ThreadPoolExecutor(threads, name)
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By model, the next one first; no model without work."""

    async def run(self, model: str, work: Callable[[], Result]) -> Result:
        """Return the result of `work`. A caller that is cancelled while it waits takes no thread."""
        await self._enter(model)
        loop = asyncio.get_running_loop()

        def done(_: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._leave)

        # A caller that is cancelled now leaves a busy thread, which counts until the work has ended.
        running = self._executor.submit(work)
        running.add_done_callback(done)
        return await asyncio.wrap_future(running)

    async def _enter(self, model: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(model, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(model, turn)
            else:
                self._leave()
            raise

    def _leave(self) -> None:
        """Give a thread to the next model, which then is the last in turn."""
        while self._waiting:
            model, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            del self._waiting[model]
            if turns:
                self._waiting[model] = turns
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, model: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(model)
        if turns is not None and turn in turns:  # else `_leave` has passed over it already
            turns.remove(turn)
            if not turns:
                del self._waiting[model]
