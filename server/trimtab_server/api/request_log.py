"""The id of each request, its line in the log and its metrics."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab_processors.parameters import SEVERAL
from trimtab_server.api.token_usage import UsageScanner
from trimtab_server.engines.vllm.endpoints import HEALTH, METRICS, READY, label_of
from trimtab_server.errors import CLIENT_CLOSED_REQUEST, is_anthropic
from trimtab_server.logs import FIELDS
from trimtab_server.metrics import Metrics
from trimtab_server.protocol import ANTHROPIC_REQUEST_ID, CONTROL_HEADER, REQUEST_ID

logger = logging.getLogger(__name__)

SHOWN_BODY_BYTES = 4096
"""As much of a request's body `log_prompts` shows."""
_PROBES = frozenset({HEALTH, READY, METRICS})
"""Endpoints that are asked every few seconds; their log lines have level DEBUG."""
_REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


class RequestLog:
    """One request and its answer, as they are counted."""

    def __init__(
        self, metrics: Metrics, method: str, path: str, given_id: str | None, *, shows_body: bool = False
    ) -> None:
        usable = given_id is not None and _REQUEST_ID_PATTERN.fullmatch(given_id)
        self.request_id = given_id if given_id and usable else uuid.uuid4().hex
        self.status: int | None = None
        self.control = ""
        self.alias: str | None = None
        """What the client calls the model, if it is not the model's own name."""
        self.resources = ExitStack()
        """What the request holds until it is over: turn, controls, the replica's response, body."""
        self.body_memory = self.resources.enter_context(ExitStack())
        """The room that its body takes, in memory or in a temporary file, until the answer begins."""
        self._metrics = metrics
        self._method = method
        self._path = path
        self._endpoint = label_of(path)
        self._model = ""
        self._applied: str | None = None
        self._tail = UsageScanner()
        self._shows_body = shows_body
        self._begun = time.perf_counter()
        self._first_byte: float | None = None

    def received(self, body: bytes, size: int | None = None) -> None:
        """The body is here, or the beginning of its `size` bytes: the log shows that, if it is to."""
        if self._shows_body:
            size = len(body) if size is None else size
            text = body[:SHOWN_BODY_BYTES].decode(errors="replace")
            fields = {"id": self.request_id, "bytes": size, "body": text}
            # As a JSON string: nothing in it can look like a line of the log.
            logger.info(
                "%s bytes=%d body=%s", self.request_id, size, json.dumps(text), extra={FIELDS: fields}
            )

    def routed(self, model: str, alias: str | None = None) -> None:
        """It is a replica's now; `model` is a configured name, `alias` what the client called it instead."""
        self._model = model
        self.alias = alias
        self._metrics.in_flight.labels(model).inc()

    def controlled_by(self, names: Sequence[str]) -> None:
        """It has these controls, configured or loaded ones; of several the metrics tell no names."""
        self.control = names[0] if len(names) == 1 else SEVERAL if names else ""

    def sent(self, message: Message) -> None:
        """A piece of the answer is on its way."""
        if message["type"] == "http.response.start":
            self.body_memory.close()
            self.status = message["status"] if self.status is None else self.status
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self.request_id
            if is_anthropic(self._path):
                headers[ANTHROPIC_REQUEST_ID] = self.request_id
            self._applied = headers.get(CONTROL_HEADER)
        elif body := message.get("body"):
            if self._first_byte is None:
                self._first_byte = self._seconds()
                self._metrics.first_byte.labels(*self._labels).observe(self._first_byte)
            self._tail.feed(body)

    def finish(self) -> None:
        """It is over: count and log it, without a word of what was said."""
        self.resources.close()
        if self._model:
            self._metrics.in_flight.labels(self._model).dec()
        status = CLIENT_CLOSED_REQUEST if self.status is None else self.status
        seconds = self._seconds()
        self._metrics.requests.labels(*self._labels, str(status)).inc()
        self._metrics.duration.labels(*self._labels).observe(seconds)
        self._log(status, seconds)

    @property
    def _labels(self) -> tuple[str, str, str]:
        return self._model, self._endpoint, self.control

    def _log(self, status: int, seconds: float) -> None:
        level = logging.DEBUG if self._path in _PROBES else logging.INFO
        if not logger.isEnabledFor(level):
            return
        usage = self._tail.usage()
        start = {"id": self.request_id, "method": self._method, "endpoint": self._endpoint}
        named: dict[str, Any] = {
            "model": self._model or None,
            "control": self._applied or self.control or None,
            "status": status,
            "seconds": round(seconds, 3),
            "first_byte": None if self._first_byte is None else round(self._first_byte, 3),
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
        }
        words = [
            *start.values(),
            *(f"{key}={'-' if value is None else value}" for key, value in named.items()),
        ]
        logger.log(level, "%s", " ".join(words), extra={FIELDS: {**start, **named}})

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun


class RequestLogMiddleware:
    """Middleware that follows every request; written against ASGI itself, so that it hides no disconnect."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, shows_bodies: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._shows_bodies = shows_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = Headers(scope=scope).get(REQUEST_ID)
        log = RequestLog(
            self._metrics, scope["method"], scope["path"], given_id, shows_body=self._shows_bodies
        )
        scope.setdefault("state", {})["log"] = log

        async def watch(message: Message) -> None:
            log.sent(message)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            log.status = 500
            raise
        finally:
            log.finish()


def request_log_of(request: Request) -> RequestLog:
    """The log that a request is part of."""
    log: RequestLog = request.state.log
    return log
