"""A replica here: a vLLM server that the gateway starts, watches, and starts again when it ends or hangs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from trimtab_server.config.schema import Settings
from trimtab_server.config.types import ADMIN_KEYS_VARIABLE
from trimtab_server.engines.client import UnixSocketAddress, Upstream
from trimtab_server.engines.liveness import Liveness
from trimtab_server.engines.process import Output, ReplicaProcess
from trimtab_server.engines.replica import Cause, OnReady, Replica, ReplicaId, State, UnreadyError
from trimtab_server.engines.vllm.command import replica_command, replica_environment
from trimtab_server.engines.vllm.endpoints import HEALTH
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
"""Between two questions whether a replica that starts answers yet."""
_PROGRESS_SECONDS = 10


@dataclass(frozen=True)
class _End:
    """The end of one run of a replica."""

    cause: Cause
    reason: str
    """What comes after "its replica"."""
    ready_seconds: float = 0
    """Seconds for which it answered."""


class LocalReplica(Replica):
    """A replica that is started here, and again when it ends."""

    def __init__(
        self,
        identity: ReplicaId,
        settings: Settings,
        directory: Path,
        output: Output,
        *,
        metrics: Metrics,
        on_ready: OnReady,
    ) -> None:
        self._socket = directory / "http"
        self._admin_key = secrets.token_urlsafe()
        upstream = Upstream(
            identity.model, UnixSocketAddress(self._socket, self._admin_key), settings.timeouts
        )
        super().__init__(identity, upstream, metrics=metrics, on_ready=on_ready)
        self._settings = settings
        self._directory = directory
        self._output = output
        self._liveness = Liveness(upstream)

    async def run(self) -> None:
        """Keep it running until cancelled, or until it has failed too often in a row."""
        try:
            await self._supervise()
        finally:
            if self.state is not State.FAILED:
                self.state = State.STOPPED
            await self.upstream.close()
            self._output.close()

    async def _supervise(self) -> None:
        rules = self._settings.restarts
        failures = 0
        while True:
            end = await self._run_once()
            self.reason = end.reason
            failures = 1 if end.ready_seconds >= rules.stable else failures + 1
            if failures > rules.attempts:
                break
            self.state = State.RESTARTING
            delay = rules.delay(failures)
            logger.error(
                "%s: its replica %s; restart %d of %d in %.0f s; %s",
                *(self.id, end.reason, failures, rules.attempts, delay, self._output.tail()),
            )
            await asyncio.sleep(delay)
            self.restarts += 1
            self._restarted[end.cause].inc()
        self.state = State.FAILED
        logger.error("%s: given up, its replica %s; %s", self.id, end.reason, self._output.tail())

    async def _run_once(self) -> _End:
        """Run its processes until they end, or hang and are ended."""
        self.state = State.STARTING
        await self.upstream.open()
        _make_empty(self._directory)
        (self._directory / "metrics").mkdir()
        model = self._settings.models[self.id.model]
        what = (self._settings, self.id.model, model.replicas[self.id.index])
        process = await ReplicaProcess.spawn(
            replica_command(*what, self._socket),
            replica_environment(*what, self._directory) | {ADMIN_KEYS_VARIABLE: self._admin_key},
            self._output,
            self._settings.timeouts.stop,
        )
        try:
            return await self._watch(process)
        finally:
            await process.end()

    async def _watch(self, process: ReplicaProcess) -> _End:
        limit = self._settings.timeouts.startup
        try:
            async with asyncio.timeout(limit):
                answers = await self._wait_until_healthy(process)
                if answers:
                    await self._become_ready()
        except TimeoutError:
            return _End(Cause.STARTUP, f"did not answer within {limit:g} s")
        except UnreadyError as error:
            return _End(Cause.STARTUP, f"could not be made ready: {error}")
        if not answers:
            return _End(Cause.STARTUP, f"ended with status {await process.wait()} before it was ready")
        return await self._serve_until_end(process)

    async def _serve_until_end(self, process: ReplicaProcess) -> _End:
        since = time.monotonic()
        self._liveness = Liveness(self.upstream)
        limit = self._settings.timeouts.unresponsive
        hanging = asyncio.create_task(self._liveness.wait_until_hung(limit, self._mark_unresponsive))
        ending = asyncio.create_task(process.wait())
        tasks = [hanging, ending, asyncio.create_task(self._health_check_loop())]
        try:
            await asyncio.wait({hanging, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not process.running:
            status = await process.wait()
            return _End(Cause.ENDED, f"ended with status {status}", time.monotonic() - since)
        return await self._break_off(since)

    async def _break_off(self, since: float) -> _End:
        """Let the requests of a replica that hangs end with an error. Its processes still run."""
        limit, fault = self._settings.timeouts.unresponsive, self._liveness.fault
        reason = f"hung: no sign of life for {limit:g} s (timeouts.unresponsive): {fault}"
        self._mark_not_ready(State.UNRESPONSIVE, reason)
        await self.upstream.break_off(f"hung and is started again: {fault}")
        return _End(Cause.UNRESPONSIVE, reason, self._liveness.last_sign - since)

    async def _check(self) -> None:
        await super()._check()
        if self._liveness.in_doubt:
            raise UnreadyError(State.UNRESPONSIVE, self._liveness.fault)

    async def _wait_until_healthy(self, process: ReplicaProcess) -> bool:
        """Returns False where its processes end first."""
        started = reported = time.monotonic()
        logger.info(
            "%s: starting on vLLM's %s model runner, its output goes to %s",
            *(self.id, self._settings.models[self.id.model].runner.upper(), self._output.path),
        )
        while process.running:
            if await self.upstream.probe(HEALTH) is not None:
                # Until now it has had what the umask leaves; the directory keeps others out in any case.
                self._socket.chmod(0o600)
                logger.info("%s: ready after %.0f s", self.id, time.monotonic() - started)
                return True
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info(
                    "%s: still starting after %.0f s: %s",
                    *(self.id, reported - started, self._output.last_line),
                )
            await asyncio.sleep(_POLL_SECONDS)
        return False


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
