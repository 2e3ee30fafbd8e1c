"""The gateway's own endpoints; `passthrough` has the others."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from trimtab_server.api import openapi
from trimtab_server.api.gateway import (
    Gateway,
    GatewayDep,
    admin_key_needed,
    key_for_metrics,
    key_needed,
    read_object,
    read_whole,
    route_to,
)
from trimtab_server.api.json_body import JsonObject, require_json
from trimtab_server.api.openapi import LoadControl, UnloadControl
from trimtab_server.api.proxy import relay_in_turn
from trimtab_server.api.request_log import request_log_of
from trimtab_server.controls.coverage import refuse_uncontrolled
from trimtab_server.controls.prompts import Chat
from trimtab_server.controls.registry import (
    XARGS,
    ResolvedControls,
    format_controls,
    refuse_own_xargs,
)
from trimtab_server.controls.request import ALIAS, FIELD, ControlRequest, from_body, from_text, split_alias
from trimtab_server.engines.pool import ModelPool, ServedModel
from trimtab_server.engines.replica import State
from trimtab_server.engines.vllm.endpoints import (
    CHAT,
    COMPLETIONS,
    CONTROLS,
    HEALTH,
    LOAD,
    MESSAGES,
    METRICS,
    MODELS,
    READY,
    RESPONSES,
    UNLOAD,
)
from trimtab_server.errors import BadRequestError, ReplicaTimeoutError
from trimtab_server.protocol import CONTROL_HEADER

open_routes = APIRouter()
routes = APIRouter(dependencies=[Depends(key_needed)], responses=openapi.ERRORS)
admin_routes = APIRouter(dependencies=[Depends(admin_key_needed)], responses=openapi.ERRORS)


@open_routes.head(HEALTH, include_in_schema=False)
@open_routes.get(HEALTH)
async def health() -> JSONResponse:
    """The gateway lives."""
    return JSONResponse({"status": "ok"})


@open_routes.head(READY, include_in_schema=False)
@open_routes.get(READY)
async def ready(gateway: GatewayDep) -> JSONResponse:
    """Whether every model has a replica that answers, and how each of them does."""
    described = await asyncio.gather(*(model.describe() for model in gateway.models.values()))
    models = dict(zip(gateway.models, described, strict=True))
    all_ready = all(model["state"] is State.READY for model in described)
    body = {"status": "ready" if all_ready else "not ready", "models": models}
    return JSONResponse(body, 200 if all_ready else 503)


@open_routes.get(METRICS, dependencies=[Depends(key_for_metrics)])
async def metrics(gateway: GatewayDep) -> Response:
    """The gateway's metrics and every replica's."""
    models = gateway.models.values()
    scrapes = await asyncio.gather(*(model.probe_all("/metrics") for model in models))
    texts = {
        model.name: [None if body is None else body.decode(errors="replace") for body in bodies]
        for model, bodies in zip(models, scrapes, strict=True)
    }
    return Response(gateway.metrics.expose(texts), media_type=CONTENT_TYPE_LATEST)


@routes.get(CONTROLS)
async def controls(gateway: GatewayDep) -> JSONResponse:
    """The controls that there are, and how each model's table maps its tokens onto theirs."""
    mappings = await _mappings(gateway.models)
    data = [
        {
            **control,
            "mappings": {name: mappings.get((name, control["id"])) for name in control["models"]},
        }
        for control in gateway.registry.describe()
    ]
    return JSONResponse({"object": "list", "data": data})


@admin_routes.post(LOAD, openapi_extra=openapi.body_of(LoadControl))
async def load_control(request: Request, gateway: GatewayDep) -> JSONResponse:
    """Load a control into every replica that is to serve it, and offer it then."""
    wanted = LoadControl.model_validate({**await read_object(request, gateway)})
    await gateway.loader.load(wanted.control_name, wanted.control_path, wanted.models)
    return JSONResponse({"status": "loaded", "control_name": wanted.control_name})


@admin_routes.post(UNLOAD, openapi_extra=openapi.body_of(UnloadControl))
async def unload_control(request: Request, gateway: GatewayDep) -> JSONResponse:
    """Offer a loaded control no more; the answer comes when no request has it, and no replica."""
    wanted = UnloadControl.model_validate({**await read_object(request, gateway)})
    # It goes on where the client does not wait for it.
    await asyncio.shield(asyncio.ensure_future(gateway.loader.unload(wanted.control_name)))
    return JSONResponse({"status": "unloaded", "control_name": wanted.control_name})


@routes.get(MODELS)
async def models(gateway: GatewayDep) -> JSONResponse:
    """The models that answer, and their aliases: each with each of its controls."""
    cards = [card for name in gateway.models if (card := await _card(gateway, name))]
    aliases = [
        _alias_card(card, control) for card in cards for control in gateway.registry.names_for(card["id"])
    ]
    return JSONResponse({"object": "list", "data": cards + aliases[: gateway.settings.limits.aliases]})


@routes.get(MODELS + "/{name:path}")
async def model(gateway: GatewayDep, name: str) -> JSONResponse:
    """One model or alias, as its replica describes it; vLLM itself has no such endpoint."""
    base, said = split_alias(name)
    gateway.model(base).require_ready()
    choices = gateway.registry.resolve(base, from_text(said, "model"), "model") if said is not None else ()
    card = await _card(gateway, base)
    if card is None:
        raise ReplicaTimeoutError(f"The replica of {base!r} does not answer.", param="model")
    return JSONResponse(_alias_card(card, said, choices) if said is not None else card)


@routes.post(CHAT, openapi_extra=openapi.generating("messages", "a chat"))
@routes.post(COMPLETIONS, openapi_extra=openapi.generating("prompt", "a completion"))
@routes.post(RESPONSES, openapi_extra=openapi.generating("input", "a response"))
@routes.post(
    MESSAGES,
    openapi_extra=openapi.generating("messages", "a message"),
    responses=openapi.ANTHROPIC_ERRORS,
)
async def generate(request: Request, gateway: GatewayDep) -> Response:
    """Generate text, under controls where they are asked for."""
    generation = await _read(request, gateway)
    _resolve_controls(request, gateway, generation)
    _admit(request, generation)
    await _validate(request, gateway, generation)
    return await _send(request, gateway, generation)


@dataclass
class _Generation:
    """A request to generate, on its way through `generate`."""

    payload: JsonObject
    size: int
    """Bytes of the body."""
    model: ServedModel
    alias: str | None
    """What the model's name says of controls."""
    controls: ResolvedControls = ()
    chat: Chat | None = None


async def _read(request: Request, gateway: Gateway) -> _Generation:
    """Read and parse the body, and find the model."""
    body = await read_whole(request, gateway)
    require_json(request)
    payload = await gateway.bodies.parse(body)
    model, alias = route_to(request, gateway, payload.get("model"))
    return _Generation(payload, len(body), model, alias)


def _resolve_controls(request: Request, gateway: Gateway, generation: _Generation) -> None:
    """Find the controls that the request asks for, and take them out of the body."""
    payload, model = generation.payload, generation.model
    refuse_own_xargs(payload)
    asked = _wanted(request, payload.pop(FIELD, None), generation.alias)
    generation.controls = gateway.registry.resolve(model.name, *asked)
    request_log_of(request).controlled_by([choice.control.name for choice in generation.controls])


def _admit(request: Request, generation: _Generation) -> None:
    """Reject a request that could not run now, and keep its controls loaded until it is over."""
    generation.model.require_ready()
    generation.model.require_room()
    for choice in generation.controls:
        request_log_of(request).resources.enter_context(choice.control.in_use())


async def _validate(request: Request, gateway: Gateway, generation: _Generation) -> None:
    """Extract the conversation. Reject one that is too long, and fields that a control does not cover."""
    path, payload = request.scope["path"], generation.payload
    if generation.alias is not None:
        payload["model"] = generation.model.name

    def validate() -> Chat | None:
        refuse_uncontrolled(path, payload, generation.controls)
        return gateway.preparer.chat(generation.model, generation.controls, path, payload)

    generation.chat = await gateway.bodies.run(generation.size, validate)


async def _send(request: Request, gateway: Gateway, generation: _Generation) -> Response:
    """Wait in the model's queue, tokenize the controls' prompts, and relay the replica's response."""
    payload, model, controls = generation.payload, generation.model, generation.controls

    async def prepare() -> bytes:
        if controls:
            own = await gateway.preparer.xargs(model, controls, generation.chat)
            payload[XARGS] = {**_xargs(payload), **own}
        return payload.encode()

    header = (CONTROL_HEADER.encode(), format_controls(controls).encode())
    return await relay_in_turn(request, model, prepare, [header])


def _wanted(request: Request, field: Any, alias: str | None) -> tuple[ControlRequest | None, str]:
    """What a request says of control, and where: its body before its header before the model's name."""
    if field is not None:
        return from_body(field), FIELD
    if lines := request.headers.getlist(CONTROL_HEADER):
        return from_text(",".join(lines), CONTROL_HEADER), CONTROL_HEADER
    return (None if alias is None else from_text(alias, "model")), "model"


async def _card(gateway: Gateway, name: str) -> dict[str, Any] | None:
    """What a model's replica says of it; None where none answers."""
    body = await gateway.models[name].probe(MODELS)
    if body is None:
        return None
    return next((card for card in json.loads(body)["data"] if card["id"] == name), None)


def _alias_card(card: dict[str, Any], said: str, choices: ResolvedControls = ()) -> dict[str, Any]:
    """A model under a control, as `/v1/models` lists adapters."""
    alias = f"{card['id']}{ALIAS}{format_controls(choices) if choices else said}"
    return {**card, "id": alias, "parent": card["id"], "owned_by": "trimtab"}


async def _mappings(models: ModelPool) -> dict[tuple[str, str], Any]:
    """By model and control, what a replica says of the table between them."""
    bodies = await asyncio.gather(*(model.probe(CONTROLS) for model in models.values()))
    found = {}
    for name, body in zip(models, bodies, strict=True):
        for control in json.loads(body)["data"] if body else ():
            found[name, control["id"]] = control.get("mapping")
    return found


def _xargs(payload: JsonObject) -> dict[str, Any]:
    xargs = payload.get(XARGS)
    if xargs is not None and not isinstance(xargs, dict):
        raise BadRequestError(f"{XARGS} is an object, got {str(xargs)[:80]}", param=XARGS)
    return xargs or {}
