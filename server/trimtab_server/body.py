"""The body of a request: read within a limit, and understood where it is JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import Request

from trimtab_server.errors import BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError

_JSON = "application/json"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it has more than `limit` bytes.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def is_json(request: Request) -> bool:
    """Whether the request says that its body is JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == _JSON


def require_json(request: Request) -> None:
    """Refuse a body that does not say that it is JSON.

    Raises:
        UnsupportedMediaTypeError: it says something else, or nothing.
    """
    if not is_json(request):
        given = request.headers.get("content-type")
        raise UnsupportedMediaTypeError(f"Content-Type must be {_JSON}, got {(given or 'none')[:80]!r}")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        BadRequestError: it is not JSON, not an object, or holds a text that is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(
            "The body is not valid JSON: it has half of a surrogate pair", code="invalid_json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequestError("The body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit} bytes.")
