"""The workers of a model: vLLM servers, started here or standing elsewhere, and how each does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Any

from trimtab_server.command import worker_command, worker_environment
from trimtab_server.errors import ApiError, WorkerUnavailableError
from trimtab_server.metrics import Metrics
from trimtab_server.process import Output, WorkerProcess
from trimtab_server.prompt_bound import CONTROLS, MODELS, prompt_bytes
from trimtab_server.settings import ADMIN_KEYS_VARIABLE, Settings
from trimtab_server.upstream import Answer, Call, Elsewhere, Here, Upstream

logger = logging.getLogger(__name__)

HEALTH = "/health"
_POLL_SECONDS = 0.25
"""Between two questions whether a worker that starts here answers yet."""
_RETRY_SECONDS = 1
"""Between two questions whether one that did not answer does."""
_PROBE_SECONDS = 3
"""Between two questions whether one that did still does."""
_FAILED_PROBES = 3
"""So many in a row, and a worker gets no more requests; one that refuses a connection gets none at once."""
_PROGRESS_SECONDS = 10

OnReady = Callable[[Upstream], Awaitable[None]]
"""What is to be done at a server that answers before requests may reach it: whenever it has started, or has
not answered for a while. It may find it done, and an `ApiError` that it raises keeps the worker unready."""


class State(StrEnum):
    """From the best to the worst; a model is in the best state of its workers'."""

    READY = "ready"
    STARTING = "starting"
    RESTARTING = "restarting"
    UNRESPONSIVE = "unresponsive"
    """It does not answer, though it should."""
    UNFIT = "unfit"
    """It answers, but can't serve what the configuration says."""
    FAILED = "failed"
    STOPPED = "stopped"


class UnreadyError(Exception):
    """A worker can't take requests."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state


@dataclass(frozen=True)
class WorkerId:
    """Which of whose workers one is."""

    model: str
    index: int
    several: bool
    """Whether the model has others."""

    @property
    def replica(self) -> str:
        """As labels have it."""
        return str(self.index)

    @property
    def short(self) -> str:
        return f"{self.model}~{self.index}" if self.several else self.model

    def __str__(self) -> str:
        return f"model {self.model}, replica {self.index}" if self.several else f"model {self.model}"


class Worker(ABC):
    """One server of a model's. Only one that is `READY` is sent requests."""

    def __init__(
        self, identity: WorkerId, upstream: Upstream, *, metrics: Metrics, on_ready: OnReady
    ) -> None:
        self.id = identity
        self.upstream = upstream
        self.state = State.STOPPED
        self.reason = ""
        """Why it is not ready, where there is more to say than the state."""
        self.restarts = 0
        self.outstanding = 0
        """Requests that it has and has not ended."""
        self.prompt_bytes: int | None = None
        """Upper bound on the bytes of a prompt that it takes; None: unknown."""
        self._on_ready = on_ready
        self._doubted = asyncio.Event()
        labels = (identity.model, identity.replica)
        self._restarted = metrics.restarts.labels(*labels)
        metrics.outstanding.labels(*labels).set_function(lambda: self.outstanding)

    async def send(self, call: Call, request_id: str) -> Answer:
        """Send it a request, which is outstanding until the answer is closed.

        Raises:
            WorkerUnavailableError: it takes no connection, and gets no more requests until it answers again.
            WorkerFailedError, WorkerTimeoutError: as of `Upstream.send`.
        """
        with contextlib.ExitStack() as held:
            self.outstanding += 1
            held.callback(self._ended)
            try:
                answer = await self.upstream.send(call, request_id)
            except WorkerUnavailableError as error:
                self._doubt(str(error))
                raise
            answer.held.push(held.pop_all())
            return answer

    async def describe(self) -> dict[str, Any]:
        """What `/ready` says of it, with its health asked for."""
        state, reason = self.state, self.reason
        if state is State.READY:
            try:
                await self._require_health()
            except UnreadyError as error:
                state, reason = error.state, str(error)
        return {
            "replica": self.id.replica,
            "state": state,
            "reason": reason or None,
            "restarts": self.restarts,
        }

    @abstractmethod
    async def run(self) -> None:
        """Keep `state` true until cancelled, or until there is no hope left."""

    async def _check(self) -> None:
        """Ask it whether it can serve.

        Raises:
            UnreadyError: it can't.
        """
        await self._require_health()

    async def _require_health(self) -> None:
        status, _ = await self._get(HEALTH)
        if status != HTTPStatus.OK:
            raise UnreadyError(State.UNRESPONSIVE, f"{HEALTH} answers with status {status}")

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            return await self.upstream.get(path)
        except ApiError as error:
            raise UnreadyError(State.UNRESPONSIVE, str(error)) from error

    async def _become_ready(self) -> None:
        """The last step before it is sent requests.

        Raises:
            UnreadyError: `on_ready` failed.
        """
        try:
            await self._on_ready(self.upstream)
            self.prompt_bytes = await prompt_bytes(self.upstream)
        except ApiError as error:
            raise UnreadyError(State.UNFIT, str(error)) from error
        except Exception as error:
            logger.exception("%s: a fault in what is done before it is ready", self.id)
            raise UnreadyError(State.UNFIT, "preparing it failed; the log has the details") from error
        self.state, self.reason = State.READY, ""

    async def _follow(self) -> None:
        """Hold `state` to what it answers, again and again."""
        failures = 0
        while True:
            try:
                await self._check()
                failures = 0
                if self.state is not State.READY:
                    await self._become_ready()
                    logger.info("%s: ready", self.id)
            except UnreadyError as error:
                failures += 1
                if self.state is not State.READY or failures >= _FAILED_PROBES:
                    self._lose(error.state, str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_SECONDS if self.state is State.READY else _RETRY_SECONDS):
                    await self._doubted.wait()
            self._doubted.clear()

    def _doubt(self, reason: str) -> None:
        if self.state is State.READY:
            self._lose(State.UNRESPONSIVE, reason)
            self._doubted.set()

    def _lose(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            logger.warning("%s: %s: %s", self.id, state, reason)
        self.state, self.reason = state, reason

    def _ended(self) -> None:
        self.outstanding -= 1


class LocalWorker(Worker):
    """A worker that is started here, and again when it ends."""

    def __init__(
        self,
        identity: WorkerId,
        settings: Settings,
        directory: Path,
        output: Output,
        *,
        metrics: Metrics,
        on_ready: OnReady,
    ) -> None:
        self._socket = directory / "http"
        self._admin_key = secrets.token_urlsafe()
        upstream = Upstream(identity.model, Here(self._socket, self._admin_key), settings.timeouts)
        super().__init__(identity, upstream, metrics=metrics, on_ready=on_ready)
        self._settings = settings
        self._directory = directory
        self._output = output

    async def run(self) -> None:
        """Keep it running until cancelled, or until it has failed too often in a row."""
        await self.upstream.open()
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
            reason, ready_seconds = await self._run_once()
            self.reason = reason
            failures = 1 if ready_seconds >= rules.stable else failures + 1
            if failures > rules.attempts:
                break
            self.state = State.RESTARTING
            delay = rules.delay(failures)
            logger.error(
                "%s: its worker %s; restart %d of %d in %.0f s; %s",
                *(self.id, reason, failures, rules.attempts, delay, self._output.tail()),
            )
            await asyncio.sleep(delay)
            self.restarts += 1
            self._restarted.inc()
        self.state = State.FAILED
        logger.error("%s: given up, its worker %s; %s", self.id, reason, self._output.tail())

    async def _run_once(self) -> tuple[str, float]:
        """Run its processes until they end. Returns why they did, and the seconds for which it answered."""
        self.state = State.STARTING
        _make_empty(self._directory)
        (self._directory / "metrics").mkdir()
        model = self._settings.models[self.id.model]
        what = (self._settings, self.id.model, model.replicas[self.id.index])
        process = await WorkerProcess.spawn(
            worker_command(*what, self._socket),
            worker_environment(*what, self._directory) | {ADMIN_KEYS_VARIABLE: self._admin_key},
            self._output,
            self._settings.timeouts.stop,
        )
        try:
            return await self._watch(process)
        finally:
            await process.end()

    async def _watch(self, process: WorkerProcess) -> tuple[str, float]:
        limit = self._settings.timeouts.startup
        try:
            async with asyncio.timeout(limit):
                answers = await self._wait_until_healthy(process)
                if answers:
                    await self._become_ready()
        except TimeoutError:
            return f"did not answer within {limit:g} s", 0
        except UnreadyError as error:
            return f"could not be made ready: {error}", 0
        if not answers:
            return f"ended with status {await process.wait()} before it was ready", 0
        since = time.monotonic()
        following = asyncio.create_task(self._follow())
        try:
            status = await process.wait()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        return f"ended with status {status}", time.monotonic() - since

    async def _wait_until_healthy(self, process: WorkerProcess) -> bool:
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


class RemoteWorker(Worker):
    """A worker elsewhere, which somebody else starts and ends."""

    def __init__(
        self,
        identity: WorkerId,
        settings: Settings,
        address: Elsewhere,
        *,
        metrics: Metrics,
        on_ready: OnReady,
    ) -> None:
        upstream = Upstream(identity.model, address, settings.timeouts)
        super().__init__(identity, upstream, metrics=metrics, on_ready=on_ready)
        self._controls = tuple(settings.controls_of(identity.model))

    async def run(self) -> None:
        """Follow what it answers until cancelled."""
        await self.upstream.open()
        self.state = State.STARTING
        try:
            await self._follow()
        finally:
            self.state = State.STOPPED
            await self.upstream.close()

    async def _check(self) -> None:
        await super()._check()
        models = await self._ids(MODELS)
        if self.id.model not in models:
            raise UnreadyError(State.UNFIT, f"it has no model {self.id.model!r}; it has {_listed(models)}")
        if not self._controls:
            return
        controls = await self._ids(CONTROLS)
        if missing := [name for name in self._controls if name not in controls]:
            raise UnreadyError(
                State.UNFIT,
                f"it lacks controls that are offered: {_listed(missing)}; it has {_listed(controls)}",
            )

    async def _ids(self, path: str) -> list[str]:
        """The ids that it lists.

        Raises:
            UnreadyError: it does not answer, or with no list.
        """
        status, body = await self._get(path)
        if status != HTTPStatus.OK:
            raise UnreadyError(State.UNFIT, f"{path} answers with status {status}{_MEANINGS.get(status, '')}")
        try:
            return [entry["id"] for entry in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadyError(State.UNFIT, f"{path} answers with no list of objects with an id") from error


_MEANINGS: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: ": it wants another key (`key_variable`)",
    HTTPStatus.NOT_FOUND: ": it runs without Trimtab's plugin, or `url` is not where its API begins",
}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
