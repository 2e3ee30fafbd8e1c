"""The gateway's own endpoints; `passthrough` has the others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from trimtab_server.api import openapi
from trimtab_server.api.gateway import (
    Gateway,
    Here,
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
from trimtab_server.api.request_log import exchange_of
from trimtab_server.controls.coverage import refuse_uncontrolled
from trimtab_server.controls.prompts import Chat
from trimtab_server.controls.registry import (
    XARGS,
    Choices,
    applied,
    refuse_own_xargs,
)
from trimtab_server.controls.request import ALIAS, FIELD, Wanted, from_body, from_text, split_alias
from trimtab_server.engines.pool import Workers
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
from trimtab_server.errors import BadRequestError, WorkerTimeoutError
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
async def ready(here: Here) -> JSONResponse:
    """Whether every model has a worker that answers, and how each of them does."""
    described = await asyncio.gather(*(model.describe() for model in here.workers.values()))
    models = dict(zip(here.workers, described, strict=True))
    all_ready = all(model["state"] is State.READY for model in described)
    body = {"status": "ready" if all_ready else "not ready", "models": models}
    return JSONResponse(body, 200 if all_ready else 503)


@open_routes.get(METRICS, dependencies=[Depends(key_for_metrics)])
async def metrics(here: Here) -> Response:
    """The gateway's metrics and every worker's."""
    models = here.workers.values()
    scrapes = await asyncio.gather(*(model.probe_all("/metrics") for model in models))
    texts = {
        model.name: [None if body is None else body.decode(errors="replace") for body in bodies]
        for model, bodies in zip(models, scrapes, strict=True)
    }
    return Response(here.metrics.expose(texts), media_type=CONTENT_TYPE_LATEST)


@routes.get(CONTROLS)
async def controls(here: Here) -> JSONResponse:
    """The controls that there are, and how each model's table maps its tokens onto theirs."""
    mappings = await _mappings(here.workers)
    data = [
        {
            **control,
            "mappings": {name: mappings.get((name, control["id"])) for name in control["models"]},
        }
        for control in here.catalogue.describe()
    ]
    return JSONResponse({"object": "list", "data": data})


@admin_routes.post(LOAD, openapi_extra=openapi.body_of(LoadControl))
async def load_control(request: Request, here: Here) -> JSONResponse:
    """Load a control into every worker that is to serve it, and offer it then."""
    wanted = LoadControl.model_validate({**await read_object(request, here)})
    await here.loader.load(wanted.control_name, wanted.control_path, wanted.models)
    return JSONResponse({"status": "loaded", "control_name": wanted.control_name})


@admin_routes.post(UNLOAD, openapi_extra=openapi.body_of(UnloadControl))
async def unload_control(request: Request, here: Here) -> JSONResponse:
    """Offer a loaded control no more; the answer comes when no request has it, and no worker."""
    wanted = UnloadControl.model_validate({**await read_object(request, here)})
    # It goes on where the client does not wait for it.
    await asyncio.shield(asyncio.ensure_future(here.loader.unload(wanted.control_name)))
    return JSONResponse({"status": "unloaded", "control_name": wanted.control_name})


@routes.get(MODELS)
async def models(here: Here) -> JSONResponse:
    """The models that answer, and their aliases: each with each of its controls."""
    cards = [card for name in here.workers if (card := await _card(here, name))]
    aliases = [_alias_card(card, control) for card in cards for control in here.catalogue.offered(card["id"])]
    return JSONResponse({"object": "list", "data": cards + aliases[: here.settings.limits.aliases]})


@routes.get(MODELS + "/{name:path}")
async def model(here: Here, name: str) -> JSONResponse:
    """One model or alias, as its worker describes it; vLLM itself has no such endpoint."""
    base, said = split_alias(name)
    here.model(base).require_ready()
    choices = here.catalogue.choose(base, from_text(said, "model"), "model") if said is not None else ()
    card = await _card(here, base)
    if card is None:
        raise WorkerTimeoutError(f"The worker of {base!r} does not answer.", param="model")
    return JSONResponse(_alias_card(card, said, choices) if said is not None else card)


@routes.post(CHAT, openapi_extra=openapi.generating("messages", "a chat"))
@routes.post(COMPLETIONS, openapi_extra=openapi.generating("prompt", "a completion"))
@routes.post(RESPONSES, openapi_extra=openapi.generating("input", "a response"))
@routes.post(
    MESSAGES,
    openapi_extra=openapi.generating("messages", "a message"),
    responses=openapi.ANTHROPIC_ERRORS,
)
async def generate(request: Request, here: Here) -> Response:
    """Generate text, under controls where they are asked for."""
    body = await read_whole(request, here)
    require_json(request)
    payload = await here.bodies.parse(body)
    model, said = route_to(request, here, payload.get("model"))
    refuse_own_xargs(payload)
    choices = here.catalogue.choose(model.name, *_wanted(request, payload.pop(FIELD, None), said))
    exchange = exchange_of(request)
    exchange.controlled_by([choice.control.name for choice in choices])
    model.require_ready()
    model.require_place()
    for choice in choices:
        exchange.held.enter_context(choice.control.in_use())
    if said is not None:
        payload["model"] = model.name

    def examined() -> Chat | None:
        path = request.scope["path"]
        refuse_uncontrolled(path, payload, choices)
        return here.preparer.chat(model, choices, path, payload)

    chat = await here.bodies.run(len(body), examined)

    async def prepared() -> bytes:
        if choices:
            own = await here.preparer.xargs(model, choices, chat)
            payload[XARGS] = {**_xargs(payload), **own}
        return payload.encode()

    header = (CONTROL_HEADER.encode(), applied(choices).encode())
    return await relay_in_turn(request, model, prepared, [header])


def _wanted(request: Request, field: Any, alias: str | None) -> tuple[Wanted | None, str]:
    """What a request says of control, and where: its body before its header before the model's name."""
    if field is not None:
        return from_body(field), FIELD
    if lines := request.headers.getlist(CONTROL_HEADER):
        return from_text(",".join(lines), CONTROL_HEADER), CONTROL_HEADER
    return (None if alias is None else from_text(alias, "model")), "model"


async def _card(here: Gateway, name: str) -> dict[str, Any] | None:
    """What a model's worker says of it; None where none answers."""
    body = await here.workers[name].probe(MODELS)
    if body is None:
        return None
    return next((card for card in json.loads(body)["data"] if card["id"] == name), None)


def _alias_card(card: dict[str, Any], said: str, choices: Choices = ()) -> dict[str, Any]:
    """A model under a control, as `/v1/models` lists adapters."""
    alias = f"{card['id']}{ALIAS}{applied(choices) if choices else said}"
    return {**card, "id": alias, "parent": card["id"], "owned_by": "trimtab"}


async def _mappings(workers: Workers) -> dict[tuple[str, str], Any]:
    """By model and control, what a worker says of the table between them."""
    bodies = await asyncio.gather(*(model.probe(CONTROLS) for model in workers.values()))
    found = {}
    for name, body in zip(workers, bodies, strict=True):
        for control in json.loads(body)["data"] if body else ():
            found[name, control["id"]] = control.get("mapping")
    return found


def _xargs(payload: JsonObject) -> dict[str, Any]:
    xargs = payload.get(XARGS)
    if xargs is not None and not isinstance(xargs, dict):
        raise BadRequestError(f"{XARGS} is an object, got {str(xargs)[:80]}", param=XARGS)
    return xargs or {}
