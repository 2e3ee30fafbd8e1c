"""Tells a replica that hangs from one that is busy.

A replica gives a sign of life when its front end answers and its engine either answers too or is busy: one of
its threads runs, or waits for a core. A long prefill, a compilation and a long queue are busy. A process that
is stopped, or waits for something that never comes, is not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from http import HTTPStatus

from trimtab_processors.liveness import ENGINE_HEALTH
from trimtab_server.engines.client import Upstream
from trimtab_server.engines.vllm.endpoints import HEALTH
from trimtab_server.errors import ApiError

_LOOK_SECONDS = 3
"""Between two looks at a replica."""
_BUSY_SHARE = 0.25
"""A thread that runs or waits for a core for this share of its time is busy. docs/LOG.md has measurements."""
_SILENT_LOOKS = 3
"""Fewer looks in a row without a sign of life say nothing: the gateway itself may have been held up."""
_DOUBT_SECONDS = 30
"""A replica that gives no sign of life for this long gets no more requests."""


class Liveness:
    """What is known of a replica's life, look by look."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.fault = ""
        """Why there was no sign of life at the last look."""
        self._silent_looks = 0
        self.last_sign = time.monotonic()

    def silent_for(self, seconds: float) -> bool:
        """Whether there was no sign of life for so long, at several looks."""
        return self._silent_looks >= _SILENT_LOOKS and time.monotonic() - self.last_sign >= seconds

    @property
    def in_doubt(self) -> bool:
        """Whether the replica should get no more requests."""
        return self.silent_for(_DOUBT_SECONDS)

    async def wait_until_hung(self, limit: float | None, on_doubt: Callable[[str], None]) -> None:
        """Look again and again until there was no sign of life for `limit` seconds; None: for ever.

        Args:
            limit: seconds.
            on_doubt: called with the reason at each look that leaves the replica in doubt.
        """
        while limit is None or not self.silent_for(limit):
            await asyncio.sleep(min(_LOOK_SECONDS, limit or _LOOK_SECONDS))
            await self.look()
            if self.in_doubt:
                on_doubt(self.fault)

    async def look(self) -> None:
        """Look for a sign of life."""
        try:
            self.fault = await self._find_fault()
        except ApiError as error:
            self.fault = str(error)
        if self.fault:
            self._silent_looks += 1
        else:
            self._silent_looks, self.last_sign = 0, time.monotonic()

    async def _find_fault(self) -> str:
        status, _ = await self._upstream.get(HEALTH)
        if status != HTTPStatus.OK:
            return f"{HEALTH} answers with status {status}"
        lives = _engine_lives(*await self._upstream.get(ENGINE_HEALTH))
        return "" if lives else "its engine neither answers nor computes"


def _engine_lives(status: int, body: bytes) -> bool:
    """Return False only if the replica says that its engine neither answers nor is busy."""
    try:
        health = json.loads(body) if status == HTTPStatus.OK else {}
        return bool(health["answers"]) or float(health["busy"]) >= _BUSY_SHARE
    except (ValueError, KeyError, TypeError):
        return True
