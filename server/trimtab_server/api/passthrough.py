"""Requests to every other endpoint of a replica: who may send them, and which model they are for."""

from __future__ import annotations

import io
import json
import tempfile
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.routing import Match

from trimtab_server.api.auth import require_admin, require_key
from trimtab_server.api.forms import Field, boundary_of, is_form, read_fields, write_with_value
from trimtab_server.api.gateway import Gateway, GatewayDep, read_to_file, read_whole, route_to
from trimtab_server.api.json_body import JsonObject, is_json
from trimtab_server.api.proxy import relay
from trimtab_server.api.request_log import request_log_of
from trimtab_server.config.schema import Settings
from trimtab_server.controls.registry import XARGS, refuse_own_xargs
from trimtab_server.controls.request import FIELD, from_text, split_alias
from trimtab_server.engines.vllm.endpoints import Access, access_to, methods_at
from trimtab_server.errors import (
    BadRequestError,
    ForbiddenError,
    MethodNotAllowedError,
    NotFoundError,
    UnauthorizedError,
)

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_MODEL = "model"

passthrough_routes = APIRouter()


@passthrough_routes.api_route("/{path:path}", methods=_METHODS, include_in_schema=False)
async def forward(request: Request, gateway: GatewayDep) -> Response:
    """Pass a request on to an endpoint of a replica that the gateway does not answer itself."""
    _require_access(request, gateway.settings)
    body, asked = await _read_with_base_model(request, gateway)
    if asked is None:
        asked = request.query_params.get(_MODEL)
    if asked is None and not body:
        _require_only_model(request, gateway)
    model, said = route_to(request, gateway, asked)
    if said is not None:
        # The endpoint has no use for the controls, but a name that generates nowhere is no name here either.
        gateway.registry.resolve(model.name, from_text(said, _MODEL), _MODEL)
    return await relay(request, model, body)


def _require_access(request: Request, settings: Settings) -> None:
    """Refuse a request to an endpoint that its sender may not use.

    Raises:
        NotFoundError: the endpoint is disabled, or neither the gateway nor vLLM has it.
        MethodNotAllowedError: the endpoint has other methods.
        UnauthorizedError, ForbiddenError: the endpoint needs a key that the request does not have.
    """
    path = request.scope["path"]
    access = access_to(path, settings.pass_through)
    if access is Access.DISABLED:
        raise NotFoundError("This vLLM endpoint is disabled because it would bypass controls and limits")
    methods = methods_at(path) | _own_methods(request)
    if methods and request.method not in methods:
        raise MethodNotAllowedError(request.method, path, methods)
    require_key(request, settings)
    if access is Access.ADMIN:
        require_admin(request, settings)
    elif access is Access.UNKNOWN:
        _require_admin_or_hide(request, settings)


def _own_methods(request: Request) -> set[str]:
    """The methods of the gateway's own endpoint at this path, which this request's method is not among."""
    return {
        method
        for route in request.app.routes
        if route.matches(request.scope)[0] is Match.PARTIAL
        for method in route.methods
    }


def _require_admin_or_hide(request: Request, settings: Settings) -> None:
    try:
        require_admin(request, settings)
    except (ForbiddenError, UnauthorizedError) as error:
        raise NotFoundError(
            f"There is no endpoint {request.method} {request.scope['path'][:80]}. If the replica has it, use"
            " an admin key or add the path to `pass_through`"
        ) from error


def _require_only_model(request: Request, gateway: Gateway) -> None:
    if len(gateway.models) > 1:
        path = request.scope["path"][:80]
        names = ", ".join(gateway.models)
        raise BadRequestError(
            f"{request.method} {path} needs a model. Add ?model=NAME with one of: {names}",
            param=_MODEL,
        )


async def _read_with_base_model(request: Request, gateway: Gateway) -> tuple[bytes | BinaryIO, Any]:
    """Return the body with the model's own name instead of an alias, and the name that the body has."""
    if is_form(request):
        return await _read_form(request, gateway)
    body = await read_whole(request, gateway)
    if body and is_json(request):
        return _json_with_base_model(await gateway.bodies.parse(body))
    return body, None


async def _read_form(request: Request, gateway: Gateway) -> tuple[bytes | BinaryIO, Any]:
    body = await read_to_file(request, gateway)
    if not body:
        return body, None
    form = io.BytesIO(body) if isinstance(body, bytes) else body
    boundary, size = boundary_of(request), form.seek(0, io.SEEK_END)
    field = await gateway.bodies.run(size, lambda: _model_field(form, boundary))
    if field is None:
        return body, None
    name, said = split_alias(field.value)
    if said is not None:
        held = request_log_of(request).body_memory
        renamed = held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - `held` closes it
        await gateway.bodies.run(size, lambda: write_with_value(form, field, name, renamed))
        body = renamed
    return body, field.value


def _json_with_base_model(payload: JsonObject) -> tuple[bytes, Any]:
    refuse_own_xargs(payload)
    if FIELD in payload:
        raise _no_control()
    asked = payload.get(_MODEL)
    name, said = split_alias(asked)
    if said is not None:
        payload[_MODEL] = name
    return payload.encode(), asked


def _model_field(body: BinaryIO, boundary: bytes) -> Field | None:
    fields = read_fields(body, boundary, (_MODEL, FIELD, XARGS))
    models = [field for field in fields if field.name == _MODEL]
    if any(field.name == FIELD for field in fields):
        raise _no_control()
    for field in fields:
        if field.name == XARGS:
            refuse_own_xargs({XARGS: _json_or_none(field.value)})
    if len(models) > 1:
        raise BadRequestError("`model` must occur once in the form", param=_MODEL)
    return models[0] if models else None


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _no_control() -> BadRequestError:
    return BadRequestError("This endpoint takes no control.", param=FIELD)
