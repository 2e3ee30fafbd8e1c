"""The queue in front of a model: a maximum number of running requests, and a maximum number that wait."""

from __future__ import annotations

import asyncio

from trimtab_server.errors import RETRY_AFTER_SECONDS, RateLimitError


class AdmissionQueue:
    """Admits `max_running` requests at once and queues up to `max_queued` more, first in, first out."""

    def __init__(self, model: str, max_running: int, max_queued: int) -> None:
        self._model = model
        self._max_running = max_running
        self._max_queued = max_queued
        self._slots = asyncio.Semaphore(max_running)
        self._queued = 0

    @property
    def queued(self) -> int:
        """The number of requests that wait."""
        return self._queued

    def require_room(self) -> None:
        """Reject a request that could neither run nor wait, before work is done for it.

        Raises:
            RateLimitError: the queue is full.
        """
        if self._slots.locked() and self._queued >= self._max_queued:
            raise RateLimitError(
                f"Model {self._model!r} is at capacity ({self._max_running} running,"
                f" {self._max_queued} queued). Retry after {RETRY_AFTER_SECONDS} s.",
                param="model",
            )

    async def acquire(self) -> None:
        """Wait for a slot. A request that is cancelled leaves the queue.

        Raises:
            RateLimitError: the queue is full.
        """
        self.require_room()
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1

    def release(self) -> None:
        """Give the slot to the next request."""
        self._slots.release()
