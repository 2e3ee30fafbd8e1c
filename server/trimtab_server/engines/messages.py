"""A request as the gateway sends it to a replica, and the response as it comes back."""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import aiohttp

from trimtab_processors.endpoints import ADMIN_KEY_HEADER
from trimtab_server.errors import ApiError
from trimtab_server.protocol import CONTROL_HEADER

Headers = Sequence[tuple[bytes, bytes]]
Translate = Callable[[Exception], ApiError]
_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# The client library writes the length itself; keys of the gateway are no business of a replica. Where another
# page's script may ask, the gateway decides: vLLM would say yes to all.
NOT_FORWARDED = _HOP_BY_HOP | {
    *("content-length", "expect", "x-request-id", "authorization", ADMIN_KEY_HEADER, CONTROL_HEADER),
    *("origin", "access-control-request-method", "access-control-request-headers"),
}
_NOT_RETURNED = _HOP_BY_HOP | {"date", "server", "x-request-id"}


@dataclass(frozen=True)
class UpstreamRequest:
    """One request to a replica; `target` is the path and the query as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes | BinaryIO
    """A file can be sent more than once, each time from its beginning."""

    def open_body(self) -> BinaryIO | None:
        """Open the body, if there is one; the caller closes it.

        From a file, aiohttp sends it in pieces, between which other requests go on. It closes what it has
        sent, so it gets a file of its own.
        """
        if isinstance(self.body, bytes):
            return io.BytesIO(self.body) if self.body else None
        file = os.fdopen(os.dup(self.body.fileno()), "rb")
        file.seek(0)
        return file


class UpstreamResponse:
    """The answer of a replica: its head, and a body still on the way."""

    def __init__(self, response: aiohttp.ClientResponse, translate: Translate) -> None:
        self._response = response
        self._translate = translate

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that are passed on to the client."""
        kept = forwarded_headers(self._response.raw_headers, _NOT_RETURNED)
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in kept]

    @property
    def is_event_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    @property
    def is_json(self) -> bool:
        """Whether the body is a JSON document, as it is."""
        is_plain = self._response.headers.get("content-encoding", "identity") == "identity"
        return self._response.content_type == "application/json" and is_plain

    @property
    def has_length(self) -> bool:
        """Whether the body is one whole, known in its length from the beginning."""
        return self._response.content_length is not None

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            ReplicaFailedError, ReplicaTimeoutError: it stopped midway.
        """
        return b"".join([piece async for piece in self.iter_chunks()])

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """The body, as it comes.

        Raises:
            ReplicaFailedError, ReplicaTimeoutError: it stopped midway.
        """
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error) from error

    def break_off(self) -> None:
        """Make reading the body raise a `ReplicaFailedError`."""
        self._response.content.set_exception(aiohttp.ClientConnectionError())

    def close(self) -> None:
        """Let go of the connection; vLLM aborts a request that has not ended. More than once does no harm."""
        self._response.close()


def forwarded_headers(headers: Headers, dropped: frozenset[str]) -> list[tuple[str, str]]:
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in dropped | named]
