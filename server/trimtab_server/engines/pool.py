"""The models that are served: the replicas of each, and which of them gets a request."""

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
from trimtab_server.engines.client import Upstream, UrlAddress
from trimtab_server.engines.local import LocalReplica
from trimtab_server.engines.messages import UpstreamRequest, UpstreamResponse
from trimtab_server.engines.process import Output
from trimtab_server.engines.remote import RemoteReplica
from trimtab_server.engines.replica import OnReady, Replica, ReplicaId, State
from trimtab_server.errors import ReplicaUnavailableError
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_DIRECTORY_BYTES = 60
"""A unix socket's address has 107 bytes; vLLM's own sockets add a slash, an index and 36 more."""


class ServedModel:
    """One model: the replicas that share its load, and the queue in front of them."""

    def __init__(self, name: str, replicas: Sequence[Replica], admission: AdmissionQueue) -> None:
        self.name = name
        self.replicas = tuple(replicas)
        self._admission = admission
        self._last = -1

    @property
    def state(self) -> State:
        """The best state of its replicas."""
        return _best(replica.state for replica in self.replicas)

    @property
    def prompt_bytes(self) -> int | None:
        """Upper bound on the bytes of a prompt that a replica takes; None while none has said so."""
        bounds = [replica.prompt_bytes for replica in self.replicas if replica.prompt_bytes is not None]
        return max(bounds, default=None)

    def require_ready(self) -> None:
        """Reject a request if no replica is ready.

        Raises:
            ReplicaUnavailableError: no replica is ready.
        """
        self._ready(())

    def require_room(self) -> None:
        """Reject a request if the queue is full.

        Raises:
            RateLimitError: the queue is full.
        """
        self._admission.require_room()

    async def take_turn(self, resources: contextlib.ExitStack) -> None:
        """Wait until fewer than `limits.concurrent` requests run; `resources` ends the turn.

        Raises:
            RateLimitError: the queue is full.
        """
        await self._admission.acquire()
        resources.callback(self._admission.release)

    async def send(
        self, call: UpstreamRequest, request_id: str, resources: contextlib.ExitStack
    ) -> UpstreamResponse:
        """Send a request to the replica with the fewest in flight; if it can't be connected, to the next.

        Args:
            call: the request.
            request_id: its id.
            resources: closes the response.


        Raises:
            ReplicaUnavailableError: no replica takes it; nothing has been sent.
            ReplicaFailedError, ReplicaTimeoutError: the replica that has it gives no answer.
        """
        refused: set[Replica] = set()
        while True:
            replica = self._pick(refused)
            try:
                return await replica.send(call, request_id, resources)
            except ReplicaUnavailableError:
                refused.add(replica)

    async def probe(self, path: str) -> bytes | None:
        """What a replica answers to a GET; None where none is up, or not in time."""
        try:
            replica = self._pick()
        except ReplicaUnavailableError:
            return None
        return await replica.upstream.probe(path)

    async def probe_all(self, path: str) -> list[bytes | None]:
        """What each replica answers to a GET; None where it is not up, or not in time."""
        return await asyncio.gather(*(_probe(replica, path) for replica in self.replicas))

    async def describe(self) -> dict[str, Any]:
        """What `/ready` says of it, with its replicas' health asked for."""
        replicas = await asyncio.gather(*(replica.describe() for replica in self.replicas))
        return {
            "state": _best(replica["state"] for replica in replicas),
            "restarts": sum(replica["restarts"] for replica in replicas),
            "replicas": replicas,
        }

    def _pick(self, refused: Collection[Replica] = ()) -> Replica:
        """The ready replica with the fewest requests; of equals the next in turn."""
        after = self._last + 1
        count = len(self.replicas)
        chosen = min(
            self._ready(refused), key=lambda replica: (replica.in_flight, (replica.id.index - after) % count)
        )
        self._last = chosen.id.index
        return chosen

    def _ready(self, refused: Collection[Replica]) -> list[Replica]:
        ready = [
            replica for replica in self.replicas if replica.state is State.READY and replica not in refused
        ]
        if not ready:
            raise ReplicaUnavailableError(
                f"The model {self.name!r} is not ready: {self._states()}.", param="model"
            )
        return ready

    def _states(self) -> str:
        if len(self.replicas) == 1:
            return f"it is {self.state}"
        return ", ".join(f"replica {replica.id.replica} is {replica.state}" for replica in self.replicas)


class ModelPool(Mapping[str, ServedModel]):
    """All models by their names; as a context manager it runs their replicas and leaves nothing of them."""

    def __init__(self, settings: Settings, metrics: Metrics, *, echo: bool = False) -> None:
        """Raises `SettingsError`: a replica elsewhere has no key where its `key_variable` says."""
        self._settings = settings
        self._metrics = metrics
        self._echo = echo
        self._keys = _read_keys(settings)
        self._models: dict[str, ServedModel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._directory: Path | None = None
        self._numbers = itertools.count()
        """What the replicas' directories are called: the path of a socket has to be short."""
        self.on_all_failed: Callable[[], None] = _nothing
        """Called when the last replica has been given up."""
        self.on_ready: OnReady = _no_preparation
        """Awaited before a replica gets requests; to be set before the replicas run."""

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def all(self) -> Iterator[Replica]:
        """Every replica of every model."""
        return (replica for model in self._models.values() for replica in model.replicas)

    async def __aenter__(self) -> Self:
        self._directory = _private_directory()
        try:
            self._models = {name: self._model(name, self._directory) for name in self._settings.models}
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        self._tasks = [asyncio.create_task(self._run(replica)) for replica in self.all]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _run(self, replica: Replica) -> None:
        try:
            await replica.run()
        except Exception:
            # The working directory or executable is missing. Restarting would not help.
            replica.state = State.FAILED
            logger.exception("%s: its replica can't be started", replica.id)
        if all(other.state is State.FAILED for other in self.all):
            self.on_all_failed()

    def _model(self, name: str, directory: Path) -> ServedModel:
        limits = self._settings.limits
        admission = AdmissionQueue(name, limits.concurrent, limits.queued)
        self._metrics.queued.labels(name).set_function(lambda: admission.queued)
        count = len(self._settings.models[name].replicas)
        ids = [ReplicaId(name, index, several=count > 1) for index in range(count)]
        return ServedModel(name, [self._replica(identity, directory) for identity in ids], admission)

    def _replica(self, identity: ReplicaId, directory: Path) -> Replica:
        replica = self._settings.models[identity.model].replicas[identity.index]
        if replica.url is not None:
            keys = (self._keys.get(name or "") for name in (replica.key_variable, replica.admin_key_variable))
            address = UrlAddress(replica.url, *keys)
            return RemoteReplica(
                identity, self._settings, address, metrics=self._metrics, on_ready=self.on_ready
            )
        own = directory / str(next(self._numbers))
        output = self._output(identity)
        return LocalReplica(
            identity, self._settings, own, output, metrics=self._metrics, on_ready=self.on_ready
        )

    def _output(self, identity: ReplicaId) -> Output:
        path = self._settings.logs / f"{self._settings.port}-{quote(identity.short, safe='')}.log"
        return Output(identity.short, path, echo=self._echo)


async def _probe(replica: Replica, path: str) -> bytes | None:
    return await replica.upstream.probe(path) if replica.state is State.READY else None


def _best(states: Iterator[State]) -> State:
    return min(states, key=list(State).index)


def _read_keys(settings: Settings) -> dict[str, str]:
    """The keys of the replicas elsewhere, by the variables that they are in."""
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
