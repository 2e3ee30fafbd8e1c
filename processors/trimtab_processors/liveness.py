"""Middleware for vLLM's server that asks the engine whether it still works.

vLLM's `/health` says whether the engine's process exists. It answers 200 while that process is stopped, or
waits for something that never comes. `GET /health/engine` has the engine answer between two of its steps.
An engine that does not answer within half a second is in a long step, or hangs. Its busiest thread tells
which: that of a busy engine runs or waits for a core, however loaded the machine is; that of one that hangs
sleeps. vLLM is told of the middleware by `--middleware trimtab_processors.liveness.EngineHealth`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

ENGINE_HEALTH = "/health/engine"
_PATIENCE_SECONDS = 0.5
"""For an answer, and after it for a look at the engine's threads."""
_NANOSECONDS = 1e9


class EngineHealth:
    """Middleware that answers `/health/engine`, and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._asking: asyncio.Task[None] | None = None
        """The question that the engine has not answered yet; there is never a second one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", ENGINE_HEALTH):
            answer = JSONResponse(await self._describe(scope["app"].state.engine_client))
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _describe(self, engine: Any) -> dict[str, Any]:
        """Return whether the engine `answers`, and if it does not, how `busy` it is, from 0 to 1."""
        if engine is None or await self._answers(engine):
            return {"answers": True}
        began, before = time.monotonic(), await asyncio.to_thread(_thread_seconds)
        if await self._answers(engine):
            return {"answers": True}
        after = await asyncio.to_thread(_thread_seconds)
        return {"answers": False, "busy": _busiest(before, after, time.monotonic() - began)}

    async def _answers(self, engine: Any) -> bool:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(_ask(engine))
        done, _ = await asyncio.wait({self._asking}, timeout=_PATIENCE_SECONDS)
        return bool(done) and not engine.errored


async def _ask(engine: Any) -> None:
    """Wait until the engine has answered; an error is an answer too.

    The question stays out of the ranks: in vLLM 0.32 each message makes them spin for a second. A rank that
    hangs holds up the engine at the next step.
    """
    with contextlib.suppress(Exception):
        await engine.is_sleeping()


def _thread_seconds() -> dict[Path, float]:
    """Return the time that each thread of the processes below this one has run, or waited for a core."""
    seconds = {}
    for process in psutil.Process().children(recursive=True):
        for statistics in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # it has ended
                run, waited, _ = statistics.read_text(encoding="ascii").split()
                seconds[statistics] = (int(run) + int(waited)) / _NANOSECONDS
    return seconds


def _busiest(before: Mapping[Path, float], after: Mapping[Path, float], elapsed: float) -> float | None:
    """Return the share of `elapsed` of the busiest thread; None if the kernel does not tell."""
    shares = [(seconds - before.get(thread, 0)) / elapsed for thread, seconds in after.items()]
    return max(shares, default=None)
