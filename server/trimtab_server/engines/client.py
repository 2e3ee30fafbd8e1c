"""A worker's HTTP server, as the gateway speaks to it: over a unix socket, or at a URL elsewhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from trimtab_processors.endpoints import ADMIN_KEY_HEADER
from trimtab_server.config.sections import Timeouts
from trimtab_server.engines.messages import Call, Headers
from trimtab_server.errors import ApiError, WorkerFailedError, WorkerTimeoutError, WorkerUnavailableError
from trimtab_server.protocol import CONTROL_HEADER

_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# The client library writes the length itself; keys of the gateway are no business of a worker. Where another
# page's script may ask, the gateway decides: vLLM would say yes to all.
_NOT_FORWARDED = _HOP_BY_HOP | {
    *("content-length", "expect", "x-request-id", "authorization", ADMIN_KEY_HEADER, CONTROL_HEADER),
    *("origin", "access-control-request-method", "access-control-request-headers"),
}
_NOT_RETURNED = _HOP_BY_HOP | {"date", "server", "x-request-id"}

# A connection for each request: the worker may close a reused one just as a request goes out, and a request
# that generates is not for repeating. Closing it is also how vLLM learns to abort.
_CONNECTIONS: Mapping[str, Any] = {"limit": 0, "force_close": True}

_Translate = Callable[[Exception], ApiError]


class SocketAddress:
    """A server on a unix socket of this machine."""

    origin = "http://worker"
    headers: Mapping[str, str] = {}
    dropped = _NOT_FORWARDED

    def __init__(self, socket: Path, admin_key: str | None = None) -> None:
        self._socket = socket
        self.admin_key = admin_key

    def connector(self) -> aiohttp.BaseConnector:
        return aiohttp.UnixConnector(path=str(self._socket), **_CONNECTIONS)


class RemoteAddress:
    """A server at a URL; `key` and `admin_key` are its own keys, which nobody else is sent."""

    # The host that the client wrote is the gateway's.
    dropped = _NOT_FORWARDED | {"host"}

    def __init__(self, url: str, key: str | None, admin_key: str | None = None) -> None:
        self.origin = url.rstrip("/")
        self.admin_key = admin_key
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def connector(self) -> aiohttp.BaseConnector:
        return aiohttp.TCPConnector(**_CONNECTIONS)


class Upstream:
    """The HTTP client of one worker."""

    def __init__(self, model: str, address: SocketAddress | RemoteAddress, timeouts: Timeouts) -> None:
        self.model = model
        self._address = address
        self._timeouts = timeouts
        self._client: aiohttp.ClientSession | None = None
        self._fate = ""
        self._answers: set[Answer] = set()
        """Those that have begun and are not closed."""

    @property
    def admin_headers(self) -> dict[str, str]:
        """What a request must carry that changes something in the worker."""
        key = self._address.admin_key
        return {} if key is None else {ADMIN_KEY_HEADER: key}

    async def open(self) -> None:
        """Take requests, unless it does already."""
        if self._client is not None:
            return
        self._fate = ""
        self._client = aiohttp.ClientSession(
            connector=self._address.connector(),
            headers=self._address.headers,
            timeout=self._timeout(sock_read=self._timeouts.idle),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def break_off(self, fate: str) -> None:
        """End all requests under way, each with a `WorkerFailedError` that tells the worker's `fate`."""
        self._fate = fate
        for answer in self._answers:
            answer.break_off()  # closing the client would leave their readers waiting for ever
        await self.close()

    async def send(self, call: Call, request_id: str) -> Answer:
        """Send a request and wait for the head of its answer.

        Raises:
            WorkerUnavailableError: nobody takes the connection; nothing has been sent.
            WorkerFailedError: the connection broke.
            WorkerTimeoutError: the worker fell silent.
        """
        body = call.open_body()
        try:
            response = await self._session.request(
                call.method,
                self._url(call.target),
                headers=[*_forwarded(call.headers, self._address.dropped), ("x-request-id", request_id)],
                data=body,
                allow_redirects=False,
            )
        except BaseException as error:
            if body is not None:
                body.close()
            if isinstance(error, (aiohttp.ClientError, TimeoutError)):
                raise self._translate(error) from error
            raise
        answer = Answer(response, self._translate)
        self._answers.add(answer)
        answer.held.callback(self._answers.discard, answer)
        if body is not None:
            answer.held.callback(body.close)
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of the answer to a GET, which has to come soon.

        Raises:
            WorkerUnavailableError, WorkerFailedError, WorkerTimeoutError: as of `send`.
        """
        return await self._ask("GET", path, "probe")

    async def probe(self, path: str) -> bytes | None:
        """The body of the answer to a GET; None where none comes soon, or not with 200."""
        try:
            status, body = await self.get(path)
        except ApiError:
            return None
        return body if status == HTTPStatus.OK else None

    async def post_json(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Have the worker do what may take as long as its start: `timeouts.startup`.

        Returns:
            The status of its answer, and the object that it holds.

        Raises:
            WorkerUnavailableError, WorkerTimeoutError: as of `send`.
            WorkerFailedError: the connection broke, or the answer is no JSON object.
        """
        status, content = await self._ask(
            *("POST", path, "startup"),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerFailedError(
                f"The worker of {self.model!r} answers {path} with status {status} and no JSON object.",
                param="model",
            )
        return status, answer

    async def _ask(self, method: str, path: str, limit: str, **options: Any) -> tuple[int, bytes]:
        """`limit` is the one of the configured time-outs that the whole answer has."""
        timeout = self._timeout(total=getattr(self._timeouts, limit))
        try:
            async with self._session.request(
                method, self._url(path), timeout=timeout, allow_redirects=False, **options
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error, limit) from error

    def _url(self, target: str) -> URL:
        return URL(self._address.origin + target, encoded=True)

    def _timeout(
        self, *, total: float | None = None, sock_read: float | None = None
    ) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=total, sock_connect=self._timeouts.connect, sock_read=sock_read)

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            raise WorkerUnavailableError(f"The gateway does not serve {self.model!r} now.", param="model")
        return self._client

    def _translate(self, error: Exception, limit: str = "idle") -> ApiError:
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return WorkerUnavailableError(f"The worker of {self.model!r} does not listen.", param="model")
            case TimeoutError():
                seconds = getattr(self._timeouts, limit)
                return WorkerTimeoutError(
                    f"The worker of {self.model!r} gave no answer within {seconds:g} s (timeouts.{limit}).",
                )
        fate = self._fate or "broke off the request"
        return WorkerFailedError(f"The worker of {self.model!r} {fate}.")


class Answer:
    """The answer of a worker: its head, and a body still on the way."""

    def __init__(self, response: aiohttp.ClientResponse, translate: _Translate) -> None:
        self.held = ExitStack()
        """What is given back when the answer is closed, beside its connection."""
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

    def break_off(self) -> None:
        """Let whoever reads the body get a `WorkerFailedError`."""
        self._response.content.set_exception(aiohttp.ClientConnectionError())

    def close(self) -> None:
        """Let go of the connection; vLLM aborts a request that has not ended. More than once does no harm."""
        self._response.close()
        self.held.close()


def _forwarded(headers: Headers, dropped: frozenset[str]) -> list[tuple[str, str]]:
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in dropped | named]
