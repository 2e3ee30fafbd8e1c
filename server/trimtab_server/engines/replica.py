"""What the gateway knows of each replica: a vLLM server, started here (`local`) or elsewhere (`remote`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from trimtab_server.engines.client import Upstream
from trimtab_server.engines.messages import UpstreamRequest, UpstreamResponse
from trimtab_server.engines.prompt_bound import prompt_bytes
from trimtab_server.engines.vllm.endpoints import HEALTH
from trimtab_server.errors import ApiError, ReplicaUnavailableError
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1
"""Between two questions whether one that did not answer does."""
_PROBE_SECONDS = 3
"""Between two questions whether one that did still does."""
_FAILED_PROBES = 3
"""So many in a row, and a replica gets no more requests; one that refuses a connection gets none at once."""

OnReady = Callable[[Upstream], Awaitable[None]]
"""What is to be done at a server that answers before requests may reach it: whenever it has started, or has
not answered for a while. It may find it done, and an `ApiError` that it raises keeps the replica unready."""


class State(StrEnum):
    """From the best to the worst; a model is in the best state of its replicas'."""

    READY = "ready"
    STARTING = "starting"
    RESTARTING = "restarting"
    UNRESPONSIVE = "unresponsive"
    """It does not answer, though it should."""
    MISCONFIGURED = "unfit"
    """It answers, but can't serve what the configuration says."""
    FAILED = "failed"
    STOPPED = "stopped"


class Cause(StrEnum):
    """Why a replica is started again, as metrics have it."""

    ENDED = "ended"
    """It ended by itself."""
    STARTUP = "startup"
    """It did not become ready."""
    UNRESPONSIVE = "unresponsive"
    """It hung."""


class UnreadyError(Exception):
    """A replica can't take requests."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state


@dataclass(frozen=True)
class ReplicaId:
    """Which of whose replicas one is."""

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


class Replica(ABC):
    """One server of a model's. Only one that is `READY` is sent requests."""

    def __init__(
        self, identity: ReplicaId, upstream: Upstream, *, metrics: Metrics, on_ready: OnReady
    ) -> None:
        self.id = identity
        self.upstream = upstream
        self.state = State.STOPPED
        self.reason = ""
        """Why it is not ready, where there is more to say than the state."""
        self.restarts = 0
        self.in_flight = 0
        """Requests that it has and has not ended."""
        self.prompt_bytes: int | None = None
        """Upper bound on the bytes of a prompt that it takes; None: unknown."""
        self._on_ready = on_ready
        self._doubted = asyncio.Event()
        labels = (identity.model, identity.replica)
        self._restarted = {cause: metrics.restarts.labels(*labels, cause) for cause in Cause}
        metrics.replica_in_flight.labels(*labels).set_function(lambda: self.in_flight)

    async def send(
        self, call: UpstreamRequest, request_id: str, resources: contextlib.ExitStack
    ) -> UpstreamResponse:
        """Send it a request, which is in flight until `resources` are closed.

        Raises:
            ReplicaUnavailableError: it takes no connection, and gets no more requests until it answers again.
            ReplicaFailedError, ReplicaTimeoutError: as of `Upstream.send`.
        """
        with contextlib.ExitStack() as attempt:
            self.in_flight += 1
            attempt.callback(self._ended)
            try:
                answer = await self.upstream.send(call, request_id, attempt)
            except ReplicaUnavailableError as error:
                self._mark_unresponsive(str(error))
                raise
            resources.push(attempt.pop_all())
            return answer

    async def learn_prompt_bytes(self) -> None:
        """Ask it how long a prompt it takes. It can say so once it has a control.

        Raises:
            ApiError: it does not answer.
        """
        self.prompt_bytes = await prompt_bytes(self.upstream)

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
            await self.learn_prompt_bytes()
        except ApiError as error:
            raise UnreadyError(State.MISCONFIGURED, str(error)) from error
        except Exception as error:
            logger.exception("%s: a fault in what is done before it is ready", self.id)
            raise UnreadyError(State.MISCONFIGURED, "preparing it failed; the log has the details") from error
        self.state, self.reason = State.READY, ""

    async def _health_check_loop(self) -> None:
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
                    self._mark_not_ready(error.state, str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_SECONDS if self.state is State.READY else _RETRY_SECONDS):
                    await self._doubted.wait()
            self._doubted.clear()

    def _mark_unresponsive(self, reason: str) -> None:
        if self.state is State.READY:
            self._mark_not_ready(State.UNRESPONSIVE, reason)
            self._doubted.set()

    def _mark_not_ready(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            logger.warning("%s: %s: %s", self.id, state, reason)
        self.state, self.reason = state, reason

    def _ended(self) -> None:
        self.in_flight -= 1
