"""The workers: one vLLM server for each model, started, watched and ended."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from trimtab_server.command import worker_command, worker_environment
from trimtab_server.errors import WorkerUnavailableError
from trimtab_server.metrics import Metrics
from trimtab_server.process import Output, WorkerProcess
from trimtab_server.settings import Settings
from trimtab_server.upstream import Upstream

logger = logging.getLogger(__name__)

_HEALTH = "/health"
_POLL_SECONDS = 0.25
_PROGRESS_SECONDS = 10
_MAX_DIRECTORY_BYTES = 60
"""A unix socket's address has 107 bytes; vLLM's own sockets add a slash, an index and 36 more."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"
    UNRESPONSIVE = "unresponsive"
    """Started, but it does not answer a probe."""


class Worker:
    """The worker of one model."""

    def __init__(
        self, settings: Settings, name: str, directory: Path, output: Output, metrics: Metrics
    ) -> None:
        self.name = name
        self.state = State.STOPPED
        self.restarts = 0
        self._settings = settings
        self._directory = directory
        self._output = output
        self._restarted = metrics.restarts.labels(name)
        self._socket = directory / "http"
        self.upstream = Upstream(name, self._socket, settings.timeouts)

    def require_ready(self) -> Upstream:
        """Its HTTP server.

        Raises:
            WorkerUnavailableError: it does not answer yet, or no more.
        """
        if self.state is not State.READY:
            raise WorkerUnavailableError(
                f"The model {self.name!r} is not ready: it is {self.state}.", param="model"
            )
        return self.upstream

    async def probe(self) -> State:
        """Its state, with its health asked for."""
        if self.state is State.READY and await self.upstream.probe(_HEALTH) is None:
            return State.UNRESPONSIVE
        return self.state

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
            failures = 1 if ready_seconds >= rules.stable else failures + 1
            if failures > rules.attempts:
                break
            self.state = State.RESTARTING
            delay = rules.delay(failures)
            logger.error(
                "model %s: its worker %s; restart %d of %d in %.0f s; %s",
                *(self.name, reason, failures, rules.attempts, delay, self._output.tail()),
            )
            await asyncio.sleep(delay)
            self.restarts += 1
            self._restarted.inc()
        self.state = State.FAILED
        logger.error("model %s: given up, its worker %s; %s", self.name, reason, self._output.tail())

    async def _run_once(self) -> tuple[str, float]:
        """Run its processes until they end. Returns why they did, and the seconds for which it answered."""
        self.state = State.STARTING
        _make_empty(self._directory)
        (self._directory / "metrics").mkdir()
        process = await WorkerProcess.spawn(
            worker_command(self._settings, self.name, self._socket),
            worker_environment(self._settings.models[self.name], self._directory),
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
        except TimeoutError:
            return f"did not answer within {limit:g} s", 0
        if not answers:
            return f"ended with status {await process.wait()} before it was ready", 0
        self.state = State.READY
        since = time.monotonic()
        status = await process.wait()
        return f"ended with status {status}", time.monotonic() - since

    async def _wait_until_healthy(self, process: WorkerProcess) -> bool:
        """Returns False where its processes end first."""
        started = reported = time.monotonic()
        runner = self._settings.models[self.name].runner.upper()
        logger.info(
            "model %s: starting on vLLM's %s model runner, its output goes to %s",
            *(self.name, runner, self._output.path),
        )
        while process.running:
            if await self.upstream.probe(_HEALTH) is not None:
                logger.info("model %s: ready after %.0f s", self.name, time.monotonic() - started)
                return True
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info(
                    "model %s: still starting after %.0f s: %s",
                    *(self.name, reported - started, self._output.last_line),
                )
            await asyncio.sleep(_POLL_SECONDS)
        return False


class Workers(Mapping[str, Worker]):
    """All workers by their model's name; as a context manager it runs them and leaves nothing of them."""

    def __init__(self, settings: Settings, metrics: Metrics, *, echo: bool = False) -> None:
        self._settings = settings
        self._metrics = metrics
        self._echo = echo
        self._workers: dict[str, Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._directory: Path | None = None
        self.on_all_failed: Callable[[], None] = _nothing
        """Called when the last worker has been given up."""

    def __getitem__(self, name: str) -> Worker:
        return self._workers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    async def __aenter__(self) -> Self:
        self._directory = _private_directory()
        try:
            self._workers = {
                name: Worker(
                    self._settings, name, self._directory / str(i), self._output(name), self._metrics
                )
                for i, name in enumerate(self._settings.models)
            }
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        self._tasks = [asyncio.create_task(self._run(worker)) for worker in self._workers.values()]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _run(self, worker: Worker) -> None:
        try:
            await worker.run()
        except OSError:
            # Its directory or its program is not to be had; another try would find them no better.
            worker.state = State.FAILED
            logger.exception("model %s: its worker can't be started", worker.name)
        if all(other.state is State.FAILED for other in self._workers.values()):
            self.on_all_failed()

    def _output(self, name: str) -> Output:
        path = self._settings.logs / f"{self._settings.port}-{quote(name, safe='')}.log"
        return Output(name, path, echo=self._echo)


def _private_directory() -> Path:
    """A directory that no other user can enter, with a path short enough for the sockets in it."""
    directory = tempfile.gettempdir()
    if len(directory) > _MAX_DIRECTORY_BYTES - len("/trimtab-12345678/"):
        directory = "/tmp"  # noqa: S108 - mkdtemp makes a private one below
    return Path(tempfile.mkdtemp(prefix="trimtab-", dir=directory))


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def _nothing() -> None:
    pass
