"""Passing a request on to a replica, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from trimtab_server.api.renaming import EventRenaming, event_paths, rename
from trimtab_server.api.request_log import request_log_of
from trimtab_server.engines.messages import UpstreamRequest, UpstreamResponse
from trimtab_server.engines.pool import ServedModel
from trimtab_server.errors import CLIENT_CLOSED_REQUEST, ApiError, body_for, is_anthropic, translated

Result = TypeVar("Result")
HeaderPairs = Iterable[tuple[bytes, bytes]]


def upstream_request_of(
    request: Request, body: bytes | BinaryIO, *, uncompressed: bool = False
) -> UpstreamRequest:
    """The request as a replica is to get it; `uncompressed`: such that its answer is not compressed."""
    target = request.scope["raw_path"].decode("latin-1")
    if query := request.scope["query_string"].decode("latin-1"):
        target += f"?{query}"
    headers = request.headers.raw
    if uncompressed:
        headers = [pair for pair in headers if pair[0] != b"accept-encoding"]
    return UpstreamRequest(request.method, target, headers, body)


async def relay(request: Request, model: ServedModel, body: bytes | BinaryIO) -> Response:
    """Send the request on to a replica of `model`.

    Raises:
        ReplicaUnavailableError, ReplicaFailedError, ReplicaTimeoutError: as of `ServedModel.send`.
        ClientDisconnect: the client went away before the answer began.
    """
    model.require_ready()
    return await _unless_disconnected(request, _answered(request, model, body))


async def relay_in_turn(
    request: Request,
    model: ServedModel,
    prepare: Callable[[], Awaitable[bytes]],
    extra_headers: HeaderPairs,
) -> Response:
    """Send a request that is limited on to a replica of `model`, when its turn has come.

    Within its turn it is prepared, so that the work for requests is limited as they are. A client that goes
    away leaves the queue, ends the preparation, or closes the replica's connection, at once.

    Args:
        request: as the client sent it.
        model: who gets it.
        prepare: makes the body that the replica gets.
        extra_headers: of the answer.

    Raises:
        RateLimitError: the queue is full.
        ApiError: as of `prepare`.
        ReplicaUnavailableError, ReplicaFailedError, ReplicaTimeoutError: as of `ServedModel.send`.
        ClientDisconnect: the client went away before the answer began.
    """
    model.require_ready()
    return await _unless_disconnected(request, _answered_in_turn(request, model, prepare, extra_headers))


async def _answered_in_turn(
    request: Request, model: ServedModel, prepare: Callable[[], Awaitable[bytes]], extra_headers: HeaderPairs
) -> Response:
    await model.take_turn(request_log_of(request).resources)
    return await _answered(request, model, await prepare(), extra_headers)


async def _answered(
    request: Request,
    model: ServedModel,
    body: bytes | BinaryIO,
    extra_headers: HeaderPairs = (),
) -> Response:
    """Return the replica's answer. The request's resources close it."""
    log = request_log_of(request)
    path = request.scope["path"]
    names = None if log.alias is None else (model.name, log.alias)
    call = upstream_request_of(request, body, uncompressed=names is not None or is_anthropic(path))
    answer = await model.send(call, log.request_id, log.resources)
    is_renamed = names is not None and answer.is_json
    is_translated = is_anthropic(path) and answer.is_json and answer.status >= HTTPStatus.BAD_REQUEST
    if not answer.has_length and not (is_renamed or is_translated):
        return _Relayed(answer, request, names, extra_headers)
    content = await answer.read()
    headers = answer.headers
    if is_translated:
        # vLLM's errors there have OpenAI's shape, or types that Anthropic's API does not have.
        content = translated(path, log.request_id, answer.status, content)
    elif names is not None and is_renamed:
        content = rename(content, *names)
    if is_renamed or is_translated:
        headers = [*_without_length(headers), (b"content-length", str(len(content)).encode())]
    response = Response(content, answer.status)
    response.raw_headers = [*headers, *extra_headers]
    return response


def _without_length(headers: HeaderPairs) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] != b"content-length"]


class _Relayed(StreamingResponse):
    """A response without a known length, which is relayed as it comes."""

    def __init__(
        self,
        answer: UpstreamResponse,
        request: Request,
        names: tuple[str, str] | None,
        extra_headers: HeaderPairs,
    ) -> None:
        super().__init__(self._iter_chunks(), answer.status)
        self.raw_headers = [*answer.headers, *extra_headers]
        self._answer = answer
        self._exchange = request_log_of(request)
        self._path = request.scope["path"]
        self._renaming = None
        if names is not None and answer.is_event_stream:
            self._renaming = EventRenaming(*names, event_paths(self._path))
        self._settled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._settled:
                self._exchange.status = CLIENT_CLOSED_REQUEST

    async def _iter_chunks(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._answer.iter_chunks():
                yield piece if self._renaming is None else self._renaming.feed(piece)
        except ApiError as error:
            self._exchange.status = error.status
            self._settled = True
            if not self._answer.is_event_stream:
                raise
            # The status has been sent long ago: the stream has to say it, after whatever event was cut off.
            yield self._rest() + self._event(error)
        else:
            yield self._rest()
        self._settled = True

    def _rest(self) -> bytes:
        return b"" if self._renaming is None else self._renaming.end()

    def _event(self, error: ApiError) -> bytes:
        body = body_for(self._path, self._exchange.request_id, error.status, error.body())
        return f"\n\nevent: error\ndata: {json.dumps(body)}\n\n".encode()


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
