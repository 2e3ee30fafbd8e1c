"""A bound on memory: bytes that requests reserve before they use them, and wait for in their order."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque


class ByteBudget:
    """`total` bytes. A request that finds too few left waits for the earlier ones."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def left(self) -> int:
        """The bytes that are not reserved."""
        return self._left

    async def reserve(self, amount: int) -> Reservation:
        """Wait for `amount` bytes, which must not be more than the total."""
        if self._waiting or amount > self._left:
            await self._wait(amount)
        else:
            self._left -= amount
        return Reservation(self, amount)

    def give_back(self, amount: int) -> None:
        """Return `amount` bytes, and grant those that are left to the requests that wait, in their order."""
        self._left += amount
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if wanted > self._left:
                    return
                self._left -= wanted
                turn.set_result(None)
            self._waiting.popleft()

    async def _wait(self, amount: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        place = (amount, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # `give_back` has passed over it already
                    self._waiting.remove(place)
                self.give_back(0)  # requests behind it may want fewer bytes
            else:  # they had been granted just before
                self.give_back(amount)
            raise


class Reservation:
    """Bytes of a budget that one request has."""

    def __init__(self, budget: ByteBudget, amount: int) -> None:
        self._budget = budget
        self._amount = amount

    def shrink(self, amount: int) -> None:
        """Keep only `amount` bytes, at most as many as before."""
        self._budget.give_back(self._amount - amount)
        self._amount = amount

    def release(self) -> None:
        """Keep nothing. Safe to call again."""
        self.shrink(0)
