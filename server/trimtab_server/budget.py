"""A bound on memory: bytes that requests reserve before they use them, and wait for in their order."""

from __future__ import annotations

import asyncio
from collections import deque


class ByteBudget:
    """`total` bytes; who finds too few left waits for those who came before."""

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
        """Let those who wait go on, as far as `amount` more bytes reach."""
        self._left += amount
        while self._waiting and self._waiting[0][0] <= self._left:
            wanted, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._left -= wanted
                turn.set_result(None)

    async def _wait(self, amount: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        place = (amount, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(place)
                self.give_back(0)  # those behind may want fewer bytes
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
