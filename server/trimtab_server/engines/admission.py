"""The line before a model: so many requests at once, so many that wait, in the order in which they came."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from trimtab_server.errors import RateLimitError


class Turnstile:
    """Lets `limit` through at once, and up to `places` more wait; nobody waits while there is room."""

    def __init__(self, name: str, limit: int, places: int) -> None:
        self._name = name
        self._room = limit
        self._places = places
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    def require_place(self) -> None:
        """Make sure that there is a turn or a place in the line, before work is done for who may not enter.

        Raises:
            RateLimitError: the line is full.
        """
        if not self._room and len(self._line) >= self._places:
            raise RateLimitError(
                f"The model {self._name!r} has all the requests that it takes, and {self._places} that wait.",
                param="model",
            )

    async def enter(self) -> None:
        """Wait for a turn, which `leave` gives back. Whoever is cancelled here leaves the line.

        Raises:
            RateLimitError: the line is full.
        """
        if self._room:
            self._room -= 1
            return
        self.require_place()
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._line.remove(turn)
            if not turn.cancelled():  # it had been given its turn just before
                self.leave()
            raise

    def leave(self) -> None:
        """Give the turn to the first in the line."""
        while self._line:
            turn = self._line.popleft()
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._room += 1
