"""Tells a worker that hangs from one that is busy.

A worker gives a sign of life when its front end answers and its engine either answers too or computes: the
CPU time of its processes grows. A long prefill, a compilation and a long queue compute. A process that is
stopped, or waits for something that never comes, does not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from trimtab_processors.liveness import ENGINE_HEALTH
from trimtab_server.errors import ApiError
from trimtab_server.upstream import Upstream

HEALTH = "/health"
_LOOK_SECONDS = 3
"""Between two looks at a worker."""
_BUSY_SHARE = 0.01
"""A busy engine uses more than this share of a core. One at rest was measured at 0.003 or less."""
_SILENT_LOOKS = 3
"""Fewer looks in a row without a sign of life say nothing: the gateway itself may have been held up."""
_DOUBT_SECONDS = 30
"""A worker that gives no sign of life for this long gets no more requests."""


class Liveness:
    """What is known of a worker's life, look by look."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.fault = ""
        """Why there was no sign of life at the last look."""
        self._silent_looks = 0
        self.last_sign = time.monotonic()
        self._cpu_seconds: float | None = None
        self._cpu_read_at = 0.0

    def silent_for(self, seconds: float) -> bool:
        """Whether there was no sign of life for so long, at several looks."""
        return self._silent_looks >= _SILENT_LOOKS and time.monotonic() - self.last_sign >= seconds

    @property
    def in_doubt(self) -> bool:
        """Whether the worker should get no more requests."""
        return self.silent_for(_DOUBT_SECONDS)

    async def wait_until_hung(self, limit: float | None, on_doubt: Callable[[str], None]) -> None:
        """Look again and again until there was no sign of life for `limit` seconds; None: for ever.

        Args:
            limit: seconds.
            on_doubt: called with the reason at each look that leaves the worker in doubt.
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
        engine = _engine_health(*await self._upstream.get(ENGINE_HEALTH))
        if engine["answers"] or self._computes(engine["cpu_seconds"]):
            return ""
        return "its engine neither answers nor computes"

    def _computes(self, cpu_seconds: float) -> bool:
        """Whether the engine has computed since the last time that it did not answer."""
        now = time.monotonic()
        before, elapsed = self._cpu_seconds, now - self._cpu_read_at
        self._cpu_seconds, self._cpu_read_at = cpu_seconds, now
        return before is not None and cpu_seconds - before > _BUSY_SHARE * elapsed


def _engine_health(status: int, body: bytes) -> dict[str, Any]:
    """What a worker says of its engine; one that knows nothing of it counts as one whose engine answers."""
    try:
        health = json.loads(body) if status == HTTPStatus.OK else {}
        return {"answers": bool(health["answers"]), "cpu_seconds": float(health.get("cpu_seconds", 0))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"answers": True}
