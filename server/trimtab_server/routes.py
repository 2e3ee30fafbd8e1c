"""The gateway's endpoints; whatever is not here is the worker's, and passes through."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from trimtab_server.body import is_json, parse_object, read_body, require_json
from trimtab_server.controls import FIELD, OFF, XARGS, Catalogue, refuse_beam_search, refuse_own_xargs
from trimtab_server.errors import BadRequestError, UnauthorizedError, UnknownModelError, WorkerTimeoutError
from trimtab_server.exchange import exchange_of
from trimtab_server.metrics import Metrics
from trimtab_server.relay import relay
from trimtab_server.replicas import State
from trimtab_server.settings import Settings
from trimtab_server.workers import Model, Workers

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
CONTROL_HEADER = b"x-trimtab-control"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


@dataclass(frozen=True)
class Gateway:
    """What the endpoints work with."""

    settings: Settings
    catalogue: Catalogue
    workers: Workers
    metrics: Metrics

    def model(self, model: Any) -> Model:
        """The model of this name; without a name, the only one.

        Raises:
            UnknownModelError: no model has this name.
            BadRequestError: it is no name, or there is none and several models.
        """
        if model is None and len(self.workers) == 1:
            return next(iter(self.workers.values()))
        names = ", ".join(self.workers)
        if model is None:
            raise BadRequestError(
                f"Which model? Name one of: {names} (`model` in the body or the query)", param="model"
            )
        if not isinstance(model, str):
            raise BadRequestError(f"model is the name of one, got {str(model)[:80]}", param="model")
        if model not in self.workers:
            raise UnknownModelError(f"There is no model {model[:80]!r}; there is: {names}", param="model")
        return self.workers[model]


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request has come to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


Here = Annotated[Gateway, Depends(gateway_of)]


def require_key(request: Request, here: Here) -> None:
    """Refuse a request without one of the API keys, where there are any.

    Raises:
        UnauthorizedError: it has none, or a wrong one.
    """
    keys = here.settings.api_keys
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if keys and (scheme.lower() != "bearer" or not _matches(given.strip(), keys)):
        raise UnauthorizedError("A valid API key is needed: Authorization: Bearer KEY")


open_routes = APIRouter()
routes = APIRouter(dependencies=[Depends(require_key)])


@open_routes.api_route("/health", methods=["GET", "HEAD"])
async def health() -> JSONResponse:
    """The gateway lives."""
    return JSONResponse({"status": "ok"})


@open_routes.api_route("/ready", methods=["GET", "HEAD"])
async def ready(here: Here) -> JSONResponse:
    """Whether every model has a worker that answers, and how each of them does."""
    described = await asyncio.gather(*(model.describe() for model in here.workers.values()))
    models = dict(zip(here.workers, described, strict=True))
    all_ready = all(model["state"] is State.READY for model in described)
    body = {"status": "ready" if all_ready else "not ready", "models": models}
    return JSONResponse(body, 200 if all_ready else 503)


@open_routes.get("/metrics")
async def metrics(here: Here) -> Response:
    """The gateway's metrics and every worker's."""
    models = here.workers.values()
    scrapes = await asyncio.gather(*(model.probe_all("/metrics") for model in models))
    texts = {
        model.name: [None if body is None else body.decode(errors="replace") for body in bodies]
        for model, bodies in zip(models, scrapes, strict=True)
    }
    return Response(here.metrics.expose(texts), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/controls")
async def controls(here: Here) -> JSONResponse:
    """The controls that there are."""
    return JSONResponse({"object": "list", "data": here.catalogue.describe()})


@routes.get(MODELS)
async def models(here: Here) -> JSONResponse:
    """The models that answer."""
    answers = await asyncio.gather(*(model.probe(MODELS) for model in here.workers.values()))
    data = [model for body in answers if body for model in json.loads(body)["data"]]
    return JSONResponse({"object": "list", "data": data})


@routes.get(MODELS + "/{name:path}")
async def model(here: Here, name: str) -> JSONResponse:
    """One model, as its worker describes it; vLLM itself has no such endpoint."""
    model = here.model(name)
    model.require_ready()
    body = await model.probe(MODELS)
    if body is None:
        raise WorkerTimeoutError(f"The worker of {name!r} does not answer.", param="model")
    return JSONResponse(json.loads(body)["data"][0])


@routes.post(CHAT)
@routes.post("/v1/completions")
@routes.post("/v1/responses")
@routes.post("/v1/messages")
async def generate(request: Request, here: Here) -> Response:
    """Generate text, under a control where one is asked for."""
    body = await read_body(request, here.settings.limits.body_bytes)
    require_json(request)
    payload = parse_object(body)
    model = _route(request, here, payload.get("model"))
    refuse_own_xargs(payload)
    has_field, wanted = FIELD in payload, payload.pop(FIELD, None)
    choice = here.catalogue.choose(model.name, wanted)
    if choice is not None:
        refuse_beam_search(payload)
    model.require_ready()
    if choice is not None:
        own = await choice.xargs(payload if request.scope["path"] == CHAT else None)
        payload[XARGS] = {**_xargs(payload), **own}
        exchange_of(request).control = choice.control.name
    if choice is not None or has_field:
        body = json.dumps(payload).encode()
    header = (CONTROL_HEADER, (OFF if choice is None else str(choice)).encode())
    return await relay(request, model, body, [header], limited=True)


@routes.api_route("/{path:path}", methods=_METHODS)
async def forward(request: Request, here: Here) -> Response:
    """Any other endpoint of a worker."""
    body = await read_body(request, here.settings.limits.body_bytes)
    model: Any = request.query_params.get("model")
    if body and is_json(request):
        payload = parse_object(body)
        refuse_own_xargs(payload)
        if FIELD in payload:
            raise BadRequestError("This endpoint takes no control.", param=FIELD)
        model = payload.get("model", model)
    return await relay(request, _route(request, here, model), body)


def _route(request: Request, here: Gateway, name: Any) -> Model:
    model = here.model(name)
    exchange_of(request).routed(model.name)
    return model


def _xargs(payload: dict[str, Any]) -> dict[str, Any]:
    xargs = payload.get(XARGS)
    if xargs is not None and not isinstance(xargs, dict):
        raise BadRequestError(f"{XARGS} is an object, got {str(xargs)[:80]}", param=XARGS)
    return xargs or {}


def _matches(given: str, keys: Iterable[str]) -> bool:
    """Compare with every key, in a time that says nothing of any: digests are of one length."""
    digest = hashlib.sha256(given.encode()).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return any(matches)
