"""JSON bodies, parsed only as far as the gateway needs.

A body can be tens of megabytes. Parsing all of it would stall every other request for seconds: it holds
Python's lock, also in a thread. So one fast pass parses only the top level, and makes no objects below it.
A value becomes objects when the gateway reads it, if it is small enough. Every other value reaches the
replica as the client wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from typing import Any

import msgspec
from fastapi import Request

from trimtab_server.errors import BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError
from trimtab_server.protocol import SMALL_BODY_BYTES

MAX_ITEMS = 2**18
"""Upper bound on commas and brackets in a value that is read: decoding so many objects takes 0.1 s."""
_MAX_FIELDS = 50_000
_MAX_OTHER_BYTES = 2**18
_JSON = "application/json"


class JsonObject(MutableMapping[str, Any]):
    """A JSON object whose values keep the form in which the client wrote them.

    Reading a value decodes it, each time. As in Python's `json`, the last of several equal names counts.
    """

    def __init__(self, body: bytes, fields: dict[str, msgspec.Raw]) -> None:
        self._body: bytes | None = body
        """The whole object as it came; None once it has been changed."""
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        """Decode a value.

        Raises:
            KeyError: there is no such field.
            BodyTooLargeError: it is so large that decoding it would stall other requests.
            BadRequestError: it is nested too deeply, or a number in it is too long.
        """
        raw = bytes(self._fields[name])
        if not raw.startswith(b'"'):
            _require_decodable(name, raw)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(
                f"`{name}` can't be read: {error}", param=name, code="invalid_json"
            ) from error

    def __setitem__(self, name: str, value: Any) -> None:
        self._body = None
        self._fields[name] = msgspec.Raw(json.dumps(value).encode())

    def __delitem__(self, name: str) -> None:
        del self._fields[name]
        self._body = None

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def encode(self) -> bytes:
        """Return the object as JSON: the client's own bytes, except for what was changed."""
        if self._body is None:
            self._body = msgspec.json.encode(self._fields)
        return self._body


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


class _LargeFields(msgspec.Struct, gc=False):
    """The fields of vLLM's requests that may be large for a good reason."""

    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    prompt_embeds: msgspec.Raw = msgspec.Raw()
    logit_bias: msgspec.Raw = msgspec.Raw()
    # Of embeddings, scores, classification and pooling.
    texts: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    images: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    data_1: msgspec.Raw = msgspec.Raw()
    data_2: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    queries: msgspec.Raw = msgspec.Raw()
    # Of the endpoints that undo a rendering.
    generate_response: msgspec.Raw = msgspec.Raw()
    generate_responses: msgspec.Raw = msgspec.Raw()


_LARGE_NAMES = frozenset(_LargeFields.__struct_fields__)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_large_fields = msgspec.json.Decoder(_LargeFields)


def parse_object(body: bytes) -> JsonObject:
    """Return the JSON object in `body`, its values not decoded yet.

    Raises:
        BadRequestError: it is not JSON, not an object, or a string in it is not Unicode.
        BodyTooLargeError: it has too many fields.
    """
    try:
        body.decode()  # msgspec checks only the strings that it makes
        _require_few_fields(body)
        return JsonObject(body, _fields.decode(body))
    except msgspec.ValidationError as error:
        raise BadRequestError("The body must be a JSON object.", code="invalid_json") from error
    except (ValueError, RecursionError) as error:  # msgspec's errors among them
        message = f"The body is not valid JSON: {_fault(body, error)}"
        raise BadRequestError(message, code="invalid_json") from error


def _require_decodable(name: str, raw: bytes) -> None:
    """Refuse a value that is not a string and takes long to decode: Python's lock is held meanwhile."""
    if name not in _LARGE_NAMES and len(raw) > SMALL_BODY_BYTES:
        message = f"`{name}` has {len(raw)} bytes, more than {SMALL_BODY_BYTES}"
        raise BodyTooLargeError(message, param=name)
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_ITEMS:
        raise BodyTooLargeError(f"`{name}` has more than {MAX_ITEMS} commas and brackets", param=name)


def _require_few_fields(body: bytes) -> None:
    """Refuse so many fields that their names alone would take seconds. A field has a colon and four bytes."""
    if body.count(b":") <= _MAX_FIELDS:
        return
    found = _large_fields.decode(body)
    others = len(body) - sum(len(bytes(getattr(found, name))) for name in _LARGE_NAMES)
    if others > _MAX_OTHER_BYTES:
        raise BodyTooLargeError(
            f"The body has more than {_MAX_FIELDS} colons, and {others} bytes outside of the fields that"
            " hold prompts and texts"
        )


def _fault(body: bytes, error: Exception) -> str:
    """Say what is wrong in the words of Python's `json`, which knows more of it, where that takes no time."""
    if len(body) <= SMALL_BODY_BYTES and isinstance(error, msgspec.DecodeError):
        try:
            json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as better:
            return str(better)
        return "it has half of a surrogate pair"
    return str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
