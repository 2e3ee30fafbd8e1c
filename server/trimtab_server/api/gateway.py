"""What all endpoints share: the parts of the gateway, keys, and how a request is read and routed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, Request

from trimtab_server.api.auth import require_admin, require_key
from trimtab_server.api.bodies import BodyReader
from trimtab_server.api.json_body import JsonObject, require_json
from trimtab_server.api.request_log import SHOWN_BODY_BYTES, request_log_of
from trimtab_server.config.schema import Settings
from trimtab_server.controls.loader import Loader
from trimtab_server.controls.preparing import Preparer
from trimtab_server.controls.registry import ControlRegistry
from trimtab_server.controls.request import split_alias
from trimtab_server.engines.pool import ModelPool, ServedModel
from trimtab_server.errors import BadRequestError, UnknownModelError
from trimtab_server.metrics import Metrics


@dataclass(frozen=True)
class Gateway:
    """What the endpoints work with."""

    settings: Settings
    registry: ControlRegistry
    models: ModelPool
    metrics: Metrics
    loader: Loader
    bodies: BodyReader
    preparer: Preparer

    def model(self, model: Any) -> ServedModel:
        """Return the model of this name, or the only model if there is no name.

        Raises:
            UnknownModelError: no model has this name.
            BadRequestError: the name is not a string, or is missing and there are several models.
        """
        if model is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        names = ", ".join(self.models)
        if model is None:
            raise BadRequestError(
                f"`model` is missing in the body and the query. Available models: {names}", param="model"
            )
        if not isinstance(model, str):
            raise BadRequestError(f"`model` must be a string, got {str(model)[:80]}", param="model")
        if model not in self.models:
            raise UnknownModelError(
                f"Model {model[:80]!r} does not exist. Available models: {names}", param="model"
            )
        return self.models[model]


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request has come to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(gateway_of)]


def key_needed(request: Request, gateway: GatewayDep) -> None:
    """Require an API key, if there are any."""
    require_key(request, gateway.settings)


def key_for_metrics(request: Request, gateway: GatewayDep) -> None:
    """Require an API key for metrics, if the configuration protects them."""
    if gateway.settings.protect_metrics:
        require_key(request, gateway.settings)


def admin_key_needed(request: Request, gateway: GatewayDep) -> None:
    """Require an admin key."""
    require_admin(request, gateway.settings)


async def read_whole(request: Request, gateway: Gateway) -> bytes:
    """Read the body, when there is room for it."""
    log = request_log_of(request)
    body = await gateway.bodies.read(request, log.body_memory)
    log.received(body)
    return body


async def read_to_file(request: Request, gateway: Gateway) -> bytes | BinaryIO:
    """Read a body whose content the gateway does not need: a large one is a temporary file."""
    log = request_log_of(request)
    body = await gateway.bodies.read_to_file(request, log.body_memory)
    if isinstance(body, bytes):
        log.received(body)
    else:
        size = body.tell()
        body.seek(0)
        log.received(body.read(SHOWN_BODY_BYTES), size)
    return body


async def read_object(request: Request, gateway: Gateway) -> JsonObject:
    """Read a body that must be a JSON object."""
    body = await read_whole(request, gateway)
    require_json(request)
    return await gateway.bodies.parse(body)


def route_to(request: Request, gateway: Gateway, asked: Any) -> tuple[ServedModel, str | None]:
    """Find the model of a request, and count the request as its.

    Returns:
        The model, and what an alias says of controls, if `asked` is one.
    """
    name, said = split_alias(asked)
    model = gateway.model(name)
    request_log_of(request).routed(model.name, None if said is None else asked)
    return model, said
