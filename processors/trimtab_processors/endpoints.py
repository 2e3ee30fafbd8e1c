"""The control endpoints of a vLLM server: which controls it has; loading and unloading them while it runs.

vLLM is told of them by `--middleware trimtab_processors.endpoints.ControlEndpoints`, of the engine's side by
`--worker-extension-cls trimtab_processors.worker_extension.ControlWorker`. They have the shape of vLLM's own
endpoints for LoRA adapters. Where the plugin's `control_roots` are empty, or the environment has no
`TRIMTAB_ADMIN_KEYS`, nobody can load anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from trimtab_processors.pack import ControlName, PackError, pack_below
from trimtab_processors.settings import command_line_settings, control_vocab_size, known_controls

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ADMIN_KEYS_VARIABLE = "TRIMTAB_ADMIN_KEYS"
ADMIN_KEY_HEADER = "x-trimtab-admin-key"
_POLL_SECONDS = 0.05


class LoadControl(BaseModel):
    """The body of `/v1/load_control`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_name: ControlName
    control_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadControl(BaseModel):
    """The body of `/v1/unload_control`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_name: ControlName


class ControlEndpoints:
    """Middleware that adds the endpoints to vLLM's own application, behind vLLM's own keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._added = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._added and isinstance(application := scope.get("app"), FastAPI):
            application.include_router(_router)
            self._added = True
        await self._app(scope, receive, send)


def require_admin(request: Request) -> None:
    """Refuse a request without one of the admin keys.

    Raises:
        HTTPException: there is none, or it is wrong.
    """
    keys = {key.strip() for key in os.environ.get(ADMIN_KEYS_VARIABLE, "").split(",")} - {""}
    given = hashlib.sha256(request.headers.get(ADMIN_KEY_HEADER, "").encode()).digest()
    matches = [hmac.compare_digest(given, hashlib.sha256(key.encode()).digest()) for key in keys]
    if not any(matches):
        raise HTTPException(
            403, f"a key of this server's {ADMIN_KEYS_VARIABLE} is needed: {ADMIN_KEY_HEADER}"
        )


_router = APIRouter()
_Admin = Depends(require_admin)
_changing = asyncio.Lock()
"""One change at a time: names must not change between the check and the deed."""


@_router.get("/v1/controls")
async def list_controls(request: Request) -> dict[str, Any]:
    """Return the controls that this server's engine has, and requests may name.

    `instance` changes with every start of the engine; all API servers of one engine say the same.
    """
    first, *_ = await _engine(request).collective_rpc("trimtab_describe")
    known = known_controls()
    data = [control for control in first["controls"] if known is None or control["id"] in known]
    return {"object": "list", "data": data, "instance": first["instance"]}


@_router.post("/v1/load_control", dependencies=[_Admin])
async def load_control(request: Request, body: LoadControl) -> dict[str, Any]:
    """Load a control into every rank of the engine, while it goes on."""
    settings, controls = command_line_settings(), known_controls()
    if settings is None or controls is None or not settings.control_roots:
        raise HTTPException(403, "this server loads no controls: its plugin has no control_roots")
    _require_one_engine(request)
    async with _changing:
        if body.control_name in controls:
            raise HTTPException(409, f"there is a control {body.control_name!r} already; unload it first")
        try:
            location = str(pack_below(body.control_path, settings.control_roots))
            await _load(_engine(request), body.control_name, location)
        except PackError as error:
            raise HTTPException(400, f"control_path: {error}") from error
        control_vocab_size.cache_clear()  # a pack of the same place may be another one now
        await asyncio.to_thread(control_vocab_size, location)
        controls[body.control_name] = location
    return {"status": "loaded", "control_name": body.control_name}


@_router.post("/v1/unload_control", dependencies=[_Admin])
async def unload_control(request: Request, body: UnloadControl) -> dict[str, Any]:
    """Refuse the control to further requests. Those that run with it keep it, on the V1 model runner; those
    that wait, or are preempted, go on without.
    """
    controls = known_controls()
    async with _changing:
        known = controls.pop(body.control_name, None) if controls is not None else None
        await _engine(request).collective_rpc("trimtab_unload", args=(body.control_name,))
        if known is None:
            raise HTTPException(404, f"there is no control {body.control_name!r}")
    return {"status": "unloaded", "control_name": body.control_name}


def _require_one_engine(request: Request) -> None:
    """Each front end and each data-parallel engine would have to be told, and only one of them can be.

    Raises:
        HTTPException: there are several.
    """
    started = request.app.state.args
    servers = getattr(started, "api_server_count", None) or 1
    if started.data_parallel_size > 1 or servers > 1:
        raise HTTPException(501, "controls are loaded only where there is one engine and one API server")


def _engine(request: Request) -> Any:
    return request.app.state.engine_client


async def _load(engine: Any, name: str, location: str) -> None:
    faults: list[str | None] = [None]
    await engine.collective_rpc("trimtab_begin_loading", args=(name, location))
    try:
        while None in faults:
            await asyncio.sleep(_POLL_SECONDS)
            faults = await engine.collective_rpc("trimtab_loading_fault", args=(name,))
    finally:
        loaded = not any(fault or fault is None for fault in faults)
        await engine.collective_rpc("trimtab_end_loading", args=(name, loaded))
    if not loaded:
        raise PackError(next(fault for fault in faults if fault))
