"""A replica's HTTP server, as the gateway speaks to it: over a unix socket, or at a URL elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from trimtab_processors.endpoints import ADMIN_KEY_HEADER
from trimtab_server.config.sections import Timeouts
from trimtab_server.engines.messages import (
    NOT_FORWARDED,
    UpstreamRequest,
    UpstreamResponse,
    forwarded_headers,
)
from trimtab_server.errors import ApiError, ReplicaFailedError, ReplicaTimeoutError, ReplicaUnavailableError

# A connection for each request: the replica may close a reused one just as a request goes out, and a request
# that generates is not for repeating. Closing it is also how vLLM learns to abort.
_CONNECTIONS: Mapping[str, Any] = {"limit": 0, "force_close": True}


class UnixSocketAddress:
    """A server on a unix socket of this machine."""

    origin = "http://worker"
    headers: Mapping[str, str] = {}
    dropped = NOT_FORWARDED

    def __init__(self, socket: Path, admin_key: str | None = None) -> None:
        self._socket = socket
        self.admin_key = admin_key

    def connector(self) -> aiohttp.BaseConnector:
        return aiohttp.UnixConnector(path=str(self._socket), **_CONNECTIONS)


class UrlAddress:
    """A server at a URL; `key` and `admin_key` are its own keys, which nobody else is sent."""

    # The host that the client wrote is the gateway's.
    dropped = NOT_FORWARDED | {"host"}

    def __init__(self, url: str, key: str | None, admin_key: str | None = None) -> None:
        self.origin = url.rstrip("/")
        self.admin_key = admin_key
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def connector(self) -> aiohttp.BaseConnector:
        return aiohttp.TCPConnector(**_CONNECTIONS)


class Upstream:
    """The HTTP client of one replica."""

    def __init__(self, model: str, address: UnixSocketAddress | UrlAddress, timeouts: Timeouts) -> None:
        self.model = model
        self._address = address
        self._timeouts = timeouts
        self._client: aiohttp.ClientSession | None = None
        self._fate = ""
        self._answers: set[UpstreamResponse] = set()
        """Those that have begun and are not closed."""

    @property
    def admin_headers(self) -> dict[str, str]:
        """What a request must carry that changes something in the replica."""
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
        """End all requests under way, each with a `ReplicaFailedError` that tells the replica's `fate`."""
        self._fate = fate
        for answer in self._answers:
            answer.break_off()  # closing the client would leave their readers waiting for ever
        await self.close()

    async def send(self, call: UpstreamRequest, request_id: str, resources: ExitStack) -> UpstreamResponse:
        """Send a request and wait for the head of its answer, which `resources` closes.

        Raises:
            ReplicaUnavailableError: the replica takes no connection; nothing has been sent.
            ReplicaFailedError: the connection broke.
            ReplicaTimeoutError: the replica fell silent.
        """
        body = call.open_body()
        try:
            response = await self._session.request(
                call.method,
                self._url(call.target),
                headers=[
                    *forwarded_headers(call.headers, self._address.dropped),
                    ("x-request-id", request_id),
                ],
                data=body,
                allow_redirects=False,
            )
        except BaseException as error:
            if body is not None:
                body.close()
            if isinstance(error, (aiohttp.ClientError, TimeoutError)):
                raise self._translate(error) from error
            raise
        answer = UpstreamResponse(response, self._translate)
        self._answers.add(answer)
        if body is not None:
            resources.callback(body.close)
        resources.callback(self._answers.discard, answer)
        resources.callback(answer.close)
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of the answer to a GET, which has to come soon.

        Raises:
            ReplicaUnavailableError, ReplicaFailedError, ReplicaTimeoutError: as of `send`.
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
        """Have the replica do what may take as long as its start: `timeouts.startup`.

        Returns:
            The status of its answer, and the object that it holds.

        Raises:
            ReplicaUnavailableError, ReplicaTimeoutError: as of `send`.
            ReplicaFailedError: the connection broke, or the answer is no JSON object.
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
            raise ReplicaFailedError(
                f"The replica of {self.model!r} answers {path} with status {status} and no JSON object.",
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
            raise ReplicaUnavailableError(f"The gateway does not serve {self.model!r} now.", param="model")
        return self._client

    def _translate(self, error: Exception, limit: str = "idle") -> ApiError:
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return ReplicaUnavailableError(
                    f"The replica of {self.model!r} does not listen.", param="model"
                )
            case TimeoutError():
                seconds = getattr(self._timeouts, limit)
                return ReplicaTimeoutError(
                    f"The replica of {self.model!r} gave no answer within {seconds:g} s (timeouts.{limit}).",
                )
        fate = self._fate or "broke off the request"
        return ReplicaFailedError(f"The replica of {self.model!r} {fate}.")
