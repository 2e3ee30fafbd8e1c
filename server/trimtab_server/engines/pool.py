"""The models that are served: the workers of each, and which of them gets a request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from trimtab_server.config.schema import Settings
from trimtab_server.config.types import SettingsError
from trimtab_server.engines.admission import AdmissionQueue
from trimtab_server.engines.client import Answer, RemoteAddress, Upstream
from trimtab_server.engines.local import LocalWorker
from trimtab_server.engines.messages import Call
from trimtab_server.engines.process import Output
from trimtab_server.engines.remote import RemoteWorker
from trimtab_server.engines.replica import OnReady, State, Worker, WorkerId
from trimtab_server.errors import WorkerUnavailableError
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_DIRECTORY_BYTES = 60
"""A unix socket's address has 107 bytes; vLLM's own sockets add a slash, an index and 36 more."""


class Model:
    """One model: the workers that share its load, and the line before them."""

    def __init__(self, name: str, workers: Sequence[Worker], admission: AdmissionQueue) -> None:
        self.name = name
        self.workers = tuple(workers)
        self._admission = admission
        self._last = -1

    @property
    def state(self) -> State:
        """The best of its workers'."""
        return _best(worker.state for worker in self.workers)

    @property
    def prompt_bytes(self) -> int | None:
        """Upper bound on the bytes of a prompt that a worker takes; None while none has said so."""
        bounds = [worker.prompt_bytes for worker in self.workers if worker.prompt_bytes is not None]
        return max(bounds, default=None)

    def require_ready(self) -> None:
        """Make sure that a request has a place to go to.

        Raises:
            WorkerUnavailableError: no worker answers, not yet or no more.
        """
        self._ready(())

    def require_place(self) -> None:
        """Make sure that a limited request may at least wait.

        Raises:
            RateLimitError: as many as may wait do.
        """
        self._admission.require_room()

    async def take_turn(self, held: contextlib.ExitStack) -> None:
        """Wait until this request is one of those of which there may be `limits.concurrent` at once.

        Args:
            held: gives the turn to the next request when it is closed.

        Raises:
            RateLimitError: as many as may wait do.
        """
        await self._admission.acquire()
        held.callback(self._admission.release)

    async def send(self, call: Call, request_id: str) -> Answer:
        """Send a request to the worker with the fewest; one that could not be connected goes to the next.

        Raises:
            WorkerUnavailableError: no worker takes it; nothing has been sent.
            WorkerFailedError, WorkerTimeoutError: the worker that has it gives no answer.
        """
        refused: set[Worker] = set()
        while True:
            worker = self._pick(refused)
            try:
                return await worker.send(call, request_id)
            except WorkerUnavailableError:
                refused.add(worker)

    async def probe(self, path: str) -> bytes | None:
        """What a worker answers to a GET; None where none is up, or not in time."""
        try:
            worker = self._pick()
        except WorkerUnavailableError:
            return None
        return await worker.upstream.probe(path)

    async def probe_all(self, path: str) -> list[bytes | None]:
        """What each worker answers to a GET; None where it is not up, or not in time."""
        return await asyncio.gather(*(_probe(worker, path) for worker in self.workers))

    async def describe(self) -> dict[str, Any]:
        """What `/ready` says of it, with its workers' health asked for."""
        replicas = await asyncio.gather(*(worker.describe() for worker in self.workers))
        return {
            "state": _best(replica["state"] for replica in replicas),
            "restarts": sum(replica["restarts"] for replica in replicas),
            "replicas": replicas,
        }

    def _pick(self, refused: Collection[Worker] = ()) -> Worker:
        """The ready worker with the fewest requests; of equals the next in turn."""
        after = self._last + 1
        count = len(self.workers)
        chosen = min(
            self._ready(refused), key=lambda worker: (worker.outstanding, (worker.id.index - after) % count)
        )
        self._last = chosen.id.index
        return chosen

    def _ready(self, refused: Collection[Worker]) -> list[Worker]:
        ready = [worker for worker in self.workers if worker.state is State.READY and worker not in refused]
        if not ready:
            raise WorkerUnavailableError(
                f"The model {self.name!r} is not ready: {self._states()}.", param="model"
            )
        return ready

    def _states(self) -> str:
        if len(self.workers) == 1:
            return f"it is {self.state}"
        return ", ".join(f"replica {worker.id.replica} is {worker.state}" for worker in self.workers)


class Workers(Mapping[str, Model]):
    """All models by their names; as a context manager it runs their workers and leaves nothing of them."""

    def __init__(self, settings: Settings, metrics: Metrics, *, echo: bool = False) -> None:
        """Raises `SettingsError`: a worker elsewhere has no key where its `key_variable` says."""
        self._settings = settings
        self._metrics = metrics
        self._echo = echo
        self._keys = _read_keys(settings)
        self._models: dict[str, Model] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._directory: Path | None = None
        self._numbers = itertools.count()
        """What the workers' directories are called: the path of a socket has to be short."""
        self.on_all_failed: Callable[[], None] = _nothing
        """Called when the last worker has been given up."""
        self.on_ready: OnReady = _no_preparation
        """Awaited before a worker gets requests; to be set before the workers run."""

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def all(self) -> Iterator[Worker]:
        """Every worker of every model."""
        return (worker for model in self._models.values() for worker in model.workers)

    async def __aenter__(self) -> Self:
        self._directory = _private_directory()
        try:
            self._models = {name: self._model(name, self._directory) for name in self._settings.models}
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        self._tasks = [asyncio.create_task(self._run(worker)) for worker in self.all]
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
        except Exception:
            # Its directory or its program is not to be had; another try would find them no better.
            worker.state = State.FAILED
            logger.exception("%s: its worker can't be started", worker.id)
        if all(other.state is State.FAILED for other in self.all):
            self.on_all_failed()

    def _model(self, name: str, directory: Path) -> Model:
        limits = self._settings.limits
        admission = AdmissionQueue(name, limits.concurrent, limits.queued)
        self._metrics.queued.labels(name).set_function(lambda: admission.queued)
        count = len(self._settings.models[name].replicas)
        ids = [WorkerId(name, index, several=count > 1) for index in range(count)]
        return Model(name, [self._worker(identity, directory) for identity in ids], admission)

    def _worker(self, identity: WorkerId, directory: Path) -> Worker:
        replica = self._settings.models[identity.model].replicas[identity.index]
        if replica.url is not None:
            keys = (self._keys.get(name or "") for name in (replica.key_variable, replica.admin_key_variable))
            address = RemoteAddress(replica.url, *keys)
            return RemoteWorker(
                identity, self._settings, address, metrics=self._metrics, on_ready=self.on_ready
            )
        own = directory / str(next(self._numbers))
        output = self._output(identity)
        return LocalWorker(
            identity, self._settings, own, output, metrics=self._metrics, on_ready=self.on_ready
        )

    def _output(self, identity: WorkerId) -> Output:
        path = self._settings.logs / f"{self._settings.port}-{quote(identity.short, safe='')}.log"
        return Output(identity.short, path, echo=self._echo)


async def _probe(worker: Worker, path: str) -> bytes | None:
    return await worker.upstream.probe(path) if worker.state is State.READY else None


def _best(states: Iterator[State]) -> State:
    return min(states, key=list(State).index)


def _read_keys(settings: Settings) -> dict[str, str]:
    """The keys of the workers elsewhere, by the variables that they are in."""
    keys = {}
    for name, model in settings.models.items():
        for i, replica in enumerate(model.replicas):
            for key, variable in replica.key_variables.items():
                keys[variable] = os.environ.get(variable, "").strip()
                if not keys[variable]:
                    raise SettingsError(
                        f"models.{name}.replicas.{i}.{key}: the environment has no {variable}"
                    )
    return keys


def _private_directory() -> Path:
    """A directory that no other user can enter, with a path short enough for the sockets in it."""
    directory = tempfile.gettempdir()
    if len(directory) > _MAX_DIRECTORY_BYTES - len("/trimtab-12345678/"):
        directory = "/tmp"  # noqa: S108 - mkdtemp makes a private one below
    return Path(tempfile.mkdtemp(prefix="trimtab-", dir=directory))


def _nothing() -> None:
    pass


async def _no_preparation(_: Upstream) -> None:
    pass
