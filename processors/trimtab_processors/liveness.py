"""Middleware for vLLM's server that asks the engine whether it still works.

vLLM's `/health` says whether the engine's process exists. It answers 200 while that process is stopped, or
waits for something that never comes. `GET /health/engine` has the engine answer between two of its steps.
An engine that does not answer within a second is in a long step, or hangs. The CPU time of its processes
tells which: it grows while the engine is busy. vLLM is told of the middleware by
`--middleware trimtab_processors.liveness.EngineHealth`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import psutil
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ENGINE_HEALTH = "/health/engine"
_PATIENCE_SECONDS = 1


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
        """Return `answers`, and for an engine that does not answer the `cpu_seconds` of its processes."""
        if engine is None or await self._answers(engine):
            return {"answers": True}
        return {"answers": False, "cpu_seconds": await asyncio.to_thread(_cpu_seconds)}

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


def _cpu_seconds() -> float:
    """Return the time that the processes below this one have computed, or waited for a disk."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times())
    return total
