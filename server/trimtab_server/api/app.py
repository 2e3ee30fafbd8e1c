"""The gateway as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from trimtab_server.api.bodies import BodyReader
from trimtab_server.api.gateway import Gateway
from trimtab_server.api.passthrough import passthrough_routes
from trimtab_server.api.playground import playground_routes
from trimtab_server.api.request_log import RequestLogMiddleware
from trimtab_server.api.routes import admin_routes, open_routes, routes
from trimtab_server.config.schema import Settings
from trimtab_server.config.sections import Cors
from trimtab_server.controls.loader import Loader
from trimtab_server.controls.preparing import Preparer
from trimtab_server.controls.registry import ControlRegistry
from trimtab_server.engines.pool import ModelPool
from trimtab_server.errors import (
    ApiError,
    on_api_error,
    on_disconnect,
    on_fault,
    on_http_exception,
    on_validation_error,
)
from trimtab_server.metrics import Metrics
from trimtab_server.protocol import ANTHROPIC_REQUEST_ID, CONTROL_HEADER, REQUEST_ID


def create_app(settings: Settings, registry: ControlRegistry, models: ModelPool, metrics: Metrics) -> FastAPI:
    """The application; `models` run for as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with models:
            yield

    loader = Loader(settings, registry, models)
    models.on_ready = loader.prepare
    app = FastAPI(
        title="Trimtab", version=version("trimtab"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.gateway = Gateway(
        settings,
        registry,
        models,
        metrics,
        loader,
        bodies=BodyReader(settings),
        preparer=Preparer(settings.limits),
    )
    if settings.cors.is_open:
        app.add_middleware(CORSMiddleware, **_cors_options(settings.cors))
    # Around all others, so that a preflight that another one answers is in the log too.
    app.add_middleware(RequestLogMiddleware, metrics=metrics, shows_bodies=settings.log_prompts)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_fault)
    app.add_exception_handler(ValidationError, on_validation_error)
    app.include_router(open_routes)
    app.include_router(playground_routes)
    app.include_router(admin_routes)
    app.include_router(routes)
    app.include_router(passthrough_routes)
    return app


def _cors_options(cors: Cors) -> dict[str, Any]:
    """What Starlette is told: an allowed page may ask for anything, and read our own headers too."""
    return {
        **cors.model_dump(),
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "expose_headers": [CONTROL_HEADER, REQUEST_ID, ANTHROPIC_REQUEST_ID],
    }
