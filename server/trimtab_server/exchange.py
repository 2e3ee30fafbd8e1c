"""What becomes of a request: its id, its line in the log, its metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab_server.errors import CLIENT_CLOSED_REQUEST
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
OWN_ENDPOINTS = frozenset({"/health", "/ready", "/metrics"})
_KNOWN_ENDPOINTS = OWN_ENDPOINTS | {
    *("/v1/models", "/v1/controls"),
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/v1/embeddings", "/v1/audio/transcriptions", "/v1/audio/translations"),
    *("/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank", "/version"),
}
_REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


class Exchange:
    """One request and its answer, as they are counted."""

    def __init__(self, metrics: Metrics, method: str, path: str, given_id: str | None) -> None:
        usable = given_id is not None and _REQUEST_ID_PATTERN.fullmatch(given_id)
        self.request_id = given_id if given_id and usable else uuid.uuid4().hex
        self.status: int | None = None
        self.control = ""
        self._metrics = metrics
        self._method = method
        self._path = path
        self._endpoint = path if path in _KNOWN_ENDPOINTS else "other"
        self._model = ""
        self._begun = time.perf_counter()
        self._has_bytes = False

    def routed(self, model: str) -> None:
        """It is a worker's now; `model` is a configured name."""
        self._model = model
        self._metrics.in_flight.labels(model).inc()

    def sent(self, message: Message) -> None:
        """A piece of the answer is on its way."""
        if message["type"] == "http.response.start":
            self.status = message["status"] if self.status is None else self.status
            MutableHeaders(scope=message)[REQUEST_ID] = self.request_id
        elif message.get("body") and not self._has_bytes:
            self._has_bytes = True
            self._metrics.first_byte.labels(self._model, self._endpoint).observe(self._seconds())

    def finish(self) -> None:
        """It is over: count and log it, without a word of what was said."""
        if self._model:
            self._metrics.in_flight.labels(self._model).dec()
        status = CLIENT_CLOSED_REQUEST if self.status is None else self.status
        seconds = self._seconds()
        self._metrics.requests.labels(self._model, self._endpoint, self.control, str(status)).inc()
        self._metrics.duration.labels(self._model, self._endpoint).observe(seconds)
        logger.log(
            logging.DEBUG if self._path in OWN_ENDPOINTS else logging.INFO,
            "%s %s %s model=%s control=%s status=%d seconds=%.3f",
            *(self.request_id, self._method, self._endpoint, self._model or "-", self.control or "-"),
            *(status, seconds),
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun


class Observe:
    """Middleware that follows every request; written against ASGI itself, so that it hides no disconnect."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = Headers(scope=scope).get(REQUEST_ID)
        exchange = Exchange(self._metrics, scope["method"], scope["path"], given_id)
        scope.setdefault("state", {})["exchange"] = exchange

        async def watch(message: Message) -> None:
            exchange.sent(message)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            exchange.status = 500
            raise
        finally:
            exchange.finish()


def exchange_of(request: Request) -> Exchange:
    """The exchange that a request is part of."""
    exchange: Exchange = request.state.exchange
    return exchange
