"""Controls that come and go while the gateway runs: in its registry, and in the replicas that serve them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Container, Sequence
from http import HTTPStatus
from typing import Any

from trimtab_mappings import VocabularyError
from trimtab_processors.pack import PackError, pack_below
from trimtab_server.config.schema import Settings
from trimtab_server.controls.registry import Control, ControlRegistry, load_control
from trimtab_server.engines.client import Upstream
from trimtab_server.engines.pool import ModelPool
from trimtab_server.engines.replica import Replica, State
from trimtab_server.engines.vllm.endpoints import CONTROLS, LOAD, UNLOAD
from trimtab_server.errors import (
    ApiError,
    BadRequestError,
    ConflictError,
    ControlNotFoundError,
    ForbiddenError,
    ReplicaFailedError,
    ReplicaUnavailableError,
)

logger = logging.getLogger(__name__)


class Loader:
    """Loads and unloads controls, one at a time."""

    def __init__(self, settings: Settings, registry: ControlRegistry, replicas: ModelPool) -> None:
        self._settings = settings
        self._registry = registry
        self._replicas = replicas
        self._changing = asyncio.Lock()
        self._arriving: Control | None = None
        self._leaving: set[str] = set()
        """Controls that are no more offered, but still in use."""
        self._left_behind: defaultdict[Upstream, set[str]] = defaultdict(set)
        """What a replica may still have, though it should not."""

    async def load(self, name: str, path: str, models: Sequence[str] | None) -> Control:
        """Load the pack at `path` as `name` into every replica of `models`, and offer it then.

        Args:
            name: what requests call it.
            path: a directory below one of `control_roots`.
            models: which models offer it; None: all that offer every control.

        Raises:
            ForbiddenError: the configuration has no `control_roots`.
            ConflictError: there is a control of this name, or there are as many as may be.
            BadRequestError: the pack or the models can't be used; no replica has the control.
            ReplicaUnavailableError: no replica is ready, so that nobody would have tried it.
        """
        if not self._settings.control_roots:
            raise ForbiddenError("Loading controls is disabled. Set `control_roots`")
        async with self._changing:
            self._require_room(name)
            offering = self._offering(models)
            control = await asyncio.to_thread(self._read, name, path, offering)
            if not self._ready(control):
                raise ReplicaUnavailableError("No replica is ready to try the control now", param="models")
            self._arriving = control
            try:
                await self._load_everywhere(control)
                self._registry.add(control)
            finally:
                self._arriving = None
        logger.info("control %s: loaded from %r for %s", name, control.loaded_from, ", ".join(offering))
        return control

    async def unload(self, name: str) -> None:
        """Offer a loaded control no more, wait for the requests that have it, and take it from the replicas.

        Raises:
            ControlNotFoundError: there is none of this name.
            ConflictError: the configuration has it.
        """
        async with self._changing:
            control = self._registry.get(name)
            if control is None:
                raise ControlNotFoundError(f"Control {name[:80]!r} does not exist", param="control_name")
            if control.loaded_from is None:
                raise ConflictError(
                    f"Control {name!r} is part of the configuration and can't be unloaded",
                    param="control_name",
                )
            self._registry.remove(name)
            self._leaving.add(name)
        try:
            await control.wait_until_unused()
            async with self._changing:
                await self._take_from(self._replicas_of(control), control.name)
        finally:
            self._leaving.discard(name)
        logger.info("control %s: unloaded", name)

    async def prepare(self, upstream: Upstream) -> None:
        """Give a server that is about to be sent requests what was loaded before it began.

        A control that it can't have costs it nothing else: requests for that are refused there.

        Raises:
            ApiError: it does not answer.
        """
        brought: set[Control] = set()
        # Anew each time: another may have been loaded, or unloaded, meanwhile.
        while missing := await self._missing(upstream, brought):
            for control in missing:
                brought.add(control)
                try:
                    await self._bring(upstream, control, fresh=False)
                except (BadRequestError, ReplicaFailedError) as error:
                    logger.warning("control %s: a replica goes on without it: %s", control.name, error)

    async def _missing(self, upstream: Upstream, brought: Container[Control]) -> list[Control]:
        """What a clean replica lacks; nothing happens between the last look and its answer."""
        await self._clean(upstream)
        arriving = self._arriving
        here = [arriving] if arriving and upstream.model in arriving.models else []
        return [each for each in (*self._registry.loaded(upstream.model), *here) if each not in brought]

    async def _bring(self, upstream: Upstream, control: Control, *, fresh: bool) -> None:
        """Load a control into a replica that first lets go of what it should not have any more."""
        await self._clean(upstream)
        await _load_into(upstream, control, fresh=fresh)
        self._left_behind[upstream].discard(control.name)

    async def _clean(self, upstream: Upstream) -> None:
        for name in [*self._left_behind[upstream]]:
            await _unload_from(upstream, name)
            self._left_behind[upstream].discard(name)

    def _require_room(self, name: str) -> None:
        if name in self._registry or name in self._leaving:
            raise ConflictError(f"Control {name!r} already exists. Unload it first", param="control_name")
        if len(self._registry) + len(self._leaving) >= self._settings.limits.controls:
            raise ConflictError(
                f"There are {self._settings.limits.controls} controls, as many as may be; unload one first"
            )

    def _offering(self, models: Sequence[str] | None) -> list[str]:
        able = [name for name in self._settings.models if self._settings.can_steer(name)]
        if models is None:
            models = [name for name in able if self._settings.models[name].controls is None]
        if unknown := [name for name in models if name not in able]:
            raise BadRequestError(
                f"models: {unknown[0][:80]!r} can't have controls; these can: {', '.join(able) or 'none'}",
                param="models",
            )
        if not models:
            raise BadRequestError("models: none of them takes every control; name some", param="models")
        return list(models)

    def _read(self, name: str, path: str, models: Sequence[str]) -> Control:
        try:
            return load_control(name, str(pack_below(path, self._settings.control_roots)), models)
        except (PackError, VocabularyError) as error:
            raise BadRequestError(f"control_path: {error}", param="control_path") from error

    async def _load_everywhere(self, control: Control) -> None:
        ready = self._ready(control)
        loading = (self._bring(replica.upstream, control, fresh=True) for replica in ready)
        faults = dict(zip(ready, await asyncio.gather(*loading, return_exceptions=True), strict=True))
        if fault := next((fault for fault in faults.values() if fault is not None), None):
            may_have_it = [
                replica
                for replica in self._replicas_of(control)
                if not isinstance(faults.get(replica), ConflictError)  # that one has somebody else's
            ]
            await self._take_from(may_have_it, control.name)
            raise fault
        for replica in ready:
            with contextlib.suppress(ApiError):  # what it takes at most is a bound, not a need
                await replica.learn_prompt_bytes()

    async def _take_from(self, replicas: Sequence[Replica], name: str) -> None:
        """Unload a control from the replicas that are ready; from the others when they come back."""
        for replica in replicas:
            self._left_behind[replica.upstream].add(name)
        unloading = (self._clean(replica.upstream) for replica in replicas if replica.state is State.READY)
        for fault in await asyncio.gather(*unloading, return_exceptions=True):
            if fault is not None:
                logger.warning("control %s: a replica may still have it: %s", name, fault)

    def _replicas_of(self, control: Control) -> list[Replica]:
        models = [self._replicas[name] for name in control.models]
        return [replica for model in models for replica in model.replicas]

    def _ready(self, control: Control) -> list[Replica]:
        """Those that can be told; the others are when they come."""
        return [replica for replica in self._replicas_of(control) if replica.state is State.READY]


async def _load_into(upstream: Upstream, control: Control, *, fresh: bool) -> None:
    """Load `control`; one of the same place that is there already does, unless it is to be `fresh`.

    Raises:
        ConflictError: the replica has another of this name, which is not ours to unload.
    """
    there = await _controls_of(upstream)
    if control.name in there:
        if there[control.name] != control.loaded_from:
            raise ConflictError(
                f"{upstream.model}: a replica has another control {control.name!r}", param="control_name"
            )
        if not fresh:
            return
        await _unload_from(upstream, control.name)
    body = {"control_name": control.name, "control_path": control.loaded_from}
    status, answer = await upstream.post_json(LOAD, body, upstream.admin_headers)
    if status != HTTPStatus.OK:
        message = _message(answer)
        if status == HTTPStatus.BAD_REQUEST:
            raise BadRequestError(f"{upstream.model}: {message}", param="control_path")
        raise ReplicaFailedError(f"{upstream.model}: loading {control.name!r}: status {status}: {message}")


async def _unload_from(upstream: Upstream, name: str) -> None:
    body = {"control_name": name}
    status, answer = await upstream.post_json(UNLOAD, body, upstream.admin_headers)
    if status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
        raise ReplicaFailedError(f"{upstream.model}: unloading: status {status}: {_message(answer)}")


async def _controls_of(upstream: Upstream) -> dict[str, str]:
    """The controls that a replica has, and where their packs are."""
    status, content = await upstream.get(CONTROLS)
    try:
        if status == HTTPStatus.OK:
            return {entry["id"]: entry.get("root") for entry in json.loads(content)["data"]}
    except (ValueError, KeyError, TypeError):
        pass
    raise ReplicaFailedError(
        f"{upstream.model}: {CONTROLS} answers with status {status} and no list of controls"
    )


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return str(error.get("message") if isinstance(error, dict) else answer)[:400]
