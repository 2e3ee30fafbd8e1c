"""A replica elsewhere: a vLLM server that the gateway neither starts nor ends."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from trimtab_server.config.schema import Settings
from trimtab_server.engines.client import Upstream, UrlAddress
from trimtab_server.engines.replica import OnReady, Replica, ReplicaId, State, UnreadyError
from trimtab_server.engines.vllm.endpoints import CONTROLS, MODELS
from trimtab_server.metrics import Metrics

_INSTANCES = 64
"""Servers behind one address that are told apart."""


class RemoteReplica(Replica):
    """A replica elsewhere, which somebody else starts and ends."""

    def __init__(
        self,
        identity: ReplicaId,
        settings: Settings,
        address: UrlAddress,
        *,
        metrics: Metrics,
        on_ready: OnReady,
    ) -> None:
        upstream = Upstream(identity.model, address, settings.timeouts)
        super().__init__(identity, upstream, metrics=metrics, on_ready=on_ready)
        self._controls = tuple(settings.controls_of(identity.model))
        self._may_be_given = settings.can_steer(identity.model)
        self._instances: deque[str] = deque(maxlen=_INSTANCES)
        """The starts of servers at this address that were seen. Several servers may share it."""

    async def run(self) -> None:
        """Follow what it answers until cancelled."""
        await self.upstream.open()
        self.state = State.STARTING
        try:
            await self._health_check_loop()
        finally:
            self.state = State.STOPPED
            await self.upstream.close()

    async def _check(self) -> None:
        await super()._check()
        models = _ids(MODELS, await self._object(MODELS))
        if self.id.model not in models:
            raise UnreadyError(
                State.MISCONFIGURED, f"it has no model {self.id.model!r}; it has {_listed(models)}"
            )
        if self._may_be_given:
            await self._check_controls()

    async def _check_controls(self) -> None:
        answer = await self._object(CONTROLS, optional=not self._controls)
        if answer is None:
            return
        controls = _ids(CONTROLS, answer)
        if missing := [name for name in self._controls if name not in controls]:
            raise UnreadyError(
                State.MISCONFIGURED,
                f"it lacks controls that are offered: {_listed(missing)}; it has {_listed(controls)}",
            )
        self._note_instance(answer.get("instance"))

    def _note_instance(self, instance: object) -> None:
        """Have a server that has started anew made ready again: it has lost the controls that were loaded."""
        if not isinstance(instance, str) or instance in self._instances:
            return
        self._instances.append(instance)
        if self.state is State.READY:
            self._mark_not_ready(State.STARTING, "it has been started anew")

    async def _object(self, path: str, *, optional: bool = False) -> Any:
        """Return the JSON that it answers to a GET; None where it is `optional` and not there.

        Raises:
            UnreadyError: it does not answer, or with no JSON.
        """
        status, body = await self._get(path)
        if optional and status == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise UnreadyError(
                State.MISCONFIGURED, f"{path} answers with status {status}{_MEANINGS.get(status, '')}"
            )
        try:
            return json.loads(body)
        except ValueError as error:
            raise _no_list(path) from error


def _ids(path: str, answer: Any) -> list[str]:
    """Return the ids that the answer lists.

    Raises:
        UnreadyError: it is no list.
    """
    try:
        return [entry["id"] for entry in answer["data"]]
    except (KeyError, TypeError) as error:
        raise _no_list(path) from error


def _no_list(path: str) -> UnreadyError:
    return UnreadyError(State.MISCONFIGURED, f"{path} answers with no list of objects with an id")


_MEANINGS: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: ": it wants another key (`key_variable`)",
    HTTPStatus.NOT_FOUND: ": it runs without Trimtab's plugin, or `url` is not where its API begins",
}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
