"""Errors, as the error objects of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from trimtab_server.engines.vllm.endpoints import MESSAGES
from trimtab_server.protocol import ANTHROPIC_REQUEST_ID, REQUEST_ID

CLIENT_CLOSED_REQUEST = 499
"""The status in logs and metrics if the client disconnects before the answer. Not an HTTP status."""
RETRY_AFTER_SECONDS = 5
_ANTHROPIC_KINDS: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


class ApiError(Exception):
    """An error that the client is told of; `param` and `code` as in the OpenAI API."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    kind: str = "server_error"
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {key: value and _printable(value) for key, value in error.items()}}


class BadRequestError(ApiError):
    status = HTTPStatus.BAD_REQUEST
    kind = "invalid_request_error"


class UnauthorizedError(ApiError):
    status = HTTPStatus.UNAUTHORIZED
    kind = "authentication_error"
    code = "invalid_api_key"
    headers = (("WWW-Authenticate", "Bearer"),)


class UnknownModelError(BadRequestError):
    status = HTTPStatus.NOT_FOUND
    code = "model_not_found"


class ForbiddenError(ApiError):
    """The endpoint is disabled, or the key does not allow it."""

    status = HTTPStatus.FORBIDDEN
    kind = "permission_error"
    code = "forbidden"


class NotFoundError(BadRequestError):
    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class ControlNotFoundError(NotFoundError):
    code = "control_not_found"


class ConflictError(BadRequestError):
    status = HTTPStatus.CONFLICT
    code = "conflict"


class PromptTooLongError(BadRequestError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "prompt_too_long"


class BodyTooLargeError(BadRequestError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


class RequestTimeoutError(BadRequestError):
    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request_timeout"


class MethodNotAllowedError(BadRequestError):
    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        listed = ", ".join(sorted(allowed))
        super().__init__(f"{path[:80]} does not take {method}. Allowed methods: {listed}")
        self.headers = (("Allow", listed),)


class UnsupportedMediaTypeError(BadRequestError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class RateLimitError(ApiError):
    """The model has all the requests that it takes; type and code are those of OpenAI's limit of requests."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    kind = "requests"
    code = "rate_limit_exceeded"
    headers = (("Retry-After", str(RETRY_AFTER_SECONDS)),)


class OverloadedError(ApiError):
    """The gateway itself has no room for the request now; nothing was sent."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "overloaded"
    headers = (("Retry-After", str(RETRY_AFTER_SECONDS)),)


class ReplicaUnavailableError(ApiError):
    """No replica of the model takes the request: it starts, restarts, or has failed; nothing was sent."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "model_not_ready"
    headers = (("Retry-After", str(RETRY_AFTER_SECONDS)),)


class ReplicaFailedError(ApiError):
    """The model's replica took the request and broke off."""

    status = HTTPStatus.BAD_GATEWAY
    code = "worker_failed"


class ReplicaTimeoutError(ApiError):
    """The model's replica took the request and fell silent."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "worker_timeout"


def _printable(text: str) -> str:
    """What a client wrote may hold half a surrogate pair, which no answer can be encoded with."""
    return text.encode(errors="backslashreplace").decode()


def is_anthropic(path: str) -> bool:
    """Whether clients of the endpoint at `path` read errors in the shape of Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def body_for(path: str, request_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return an error's body in the shape of the API that `path` belongs to.

    Args:
        path: the request's path.
        request_id: the request's id.
        status: the HTTP status of the error.
        body: the error's body in OpenAI's shape.
    """
    if not is_anthropic(path):
        return body
    other = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
    kind = _ANTHROPIC_KINDS.get(status, other)
    error = {"type": kind, "message": body["error"]["message"]}
    return {"type": "error", "error": error, "request_id": request_id}


def translated(path: str, request_id: str, status: int, content: bytes) -> bytes:
    """Return a replica's error, as JSON, in the shape of the API that `path` belongs to.

    What is no error object stays as it is.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return content
    return json.dumps(body_for(path, request_id, status, body)).encode()


def _answer(request: Request, body: dict[str, Any], status: int, headers: Mapping[str, str]) -> Response:
    request_id = request.state.log.request_id
    return JSONResponse(
        body_for(request.scope["path"], request_id, status, body), status, headers=dict(headers)
    )


async def on_api_error(request: Request, error: Exception) -> Response:
    """Answer an `ApiError`."""
    if not isinstance(error, ApiError):
        raise error
    return _answer(request, error.body(), error.status, dict(error.headers))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer the framework's own errors in the same shape."""
    if not isinstance(error, HTTPException):
        raise error
    kind = "invalid_request_error" if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return _answer(request, body, error.status_code, error.headers or {})


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answer an invalid body of one of the gateway's own endpoints."""
    if not isinstance(error, ValidationError):
        raise error
    fault = error.errors(include_url=False)[0]
    param = ".".join(map(str, fault["loc"]))[:80]
    return await on_api_error(request, BadRequestError(f"{param}: {fault['msg']}", param=param))


async def on_disconnect(_: Request, error: Exception) -> Response:
    """Give a request whose client went away a status for the log; nobody reads the answer."""
    if not isinstance(error, ClientDisconnect):
        raise error
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_fault(request: Request, _: Exception) -> Response:
    """Return a generic 500 for unexpected errors. Details go to the log."""
    request_id = request.state.log.request_id
    # This answer is made outside the middleware that adds the id to all others.
    headers = {REQUEST_ID: request_id}
    if is_anthropic(request.scope["path"]):
        headers[ANTHROPIC_REQUEST_ID] = request_id
    error = ApiError("Internal error in the gateway. The log has the details.")
    return _answer(request, error.body(), error.status, headers)
