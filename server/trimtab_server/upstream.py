"""A worker's HTTP server, as the gateway speaks to it over a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from trimtab_server.errors import ApiError, WorkerFailedError, WorkerTimeoutError, WorkerUnavailableError
from trimtab_server.settings import Timeouts

_ORIGIN = "http://worker"
_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# The client library writes the length itself; keys of the gateway are no business of a worker.
_NOT_FORWARDED = _HOP_BY_HOP | {"content-length", "authorization", "expect", "x-request-id"}
_NOT_RETURNED = _HOP_BY_HOP | {"date", "server", "x-request-id"}

Headers = Sequence[tuple[bytes, bytes]]
_Translate = Callable[[Exception], ApiError]


@dataclass(frozen=True)
class Call:
    """One request to a worker; `target` is the path and the query as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes


class Upstream:
    """The HTTP client of one worker."""

    def __init__(self, model: str, socket: Path, timeouts: Timeouts) -> None:
        self._model = model
        self._socket = socket
        self._timeouts = timeouts
        self._client: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        # A connection for each request: the worker may close a reused one just as a request goes out, and a
        # request that generates is not for repeating. Closing it is also how vLLM learns to abort.
        connector = aiohttp.UnixConnector(path=str(self._socket), limit=0, force_close=True)
        self._client = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._timeouts.connect, sock_read=self._timeouts.idle
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def send(self, call: Call, request_id: str) -> Answer:
        """Send a request and wait for the head of its answer.

        Raises:
            WorkerUnavailableError: nobody listens.
            WorkerFailedError: the connection broke.
            WorkerTimeoutError: the worker fell silent.
        """
        try:
            response = await self._session.request(
                call.method,
                URL(_ORIGIN + call.target, encoded=True),
                headers=[*_forwarded(call.headers, _NOT_FORWARDED), ("x-request-id", request_id)],
                data=call.body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error) from error
        return Answer(response, self._translate)

    async def probe(self, path: str) -> bytes | None:
        """The body of a GET that has to answer soon; None where it does not, or not with 200."""
        try:
            async with (
                asyncio.timeout(self._timeouts.probe),
                self._session.get(URL(_ORIGIN + path, encoded=True)) as response,
            ):
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return None
        return body if response.status == 200 else None

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            raise WorkerUnavailableError(f"The gateway does not serve {self._model!r} now.", param="model")
        return self._client

    def _translate(self, error: Exception) -> ApiError:
        if isinstance(error, aiohttp.ClientConnectorError):
            return WorkerUnavailableError(f"The worker of {self._model!r} does not listen.", param="model")
        if isinstance(error, TimeoutError):
            return WorkerTimeoutError(f"The worker of {self._model!r} has fallen silent.")
        return WorkerFailedError(f"The worker of {self._model!r} broke off the request.")


class Answer:
    """The answer of a worker: its head, and a body still on the way."""

    def __init__(self, response: aiohttp.ClientResponse, translate: _Translate) -> None:
        self._response = response
        self._translate = translate

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that are the client's business."""
        kept = _forwarded(self._response.raw_headers, _NOT_RETURNED)
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in kept]

    @property
    def is_event_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    @property
    def has_length(self) -> bool:
        """Whether the body is one whole, known in its length from the beginning."""
        return self._response.content_length is not None

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            WorkerFailedError, WorkerTimeoutError: it stopped midway.
        """
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes.

        Raises:
            WorkerFailedError, WorkerTimeoutError: it stopped midway.
        """
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error) from error

    def close(self) -> None:
        """Let go of the connection; vLLM aborts a request that has not ended."""
        self._response.close()


def _forwarded(headers: Headers, dropped: frozenset[str]) -> list[tuple[str, str]]:
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in dropped | named]
