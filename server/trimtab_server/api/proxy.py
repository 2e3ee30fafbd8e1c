"""Passing a request on to a worker, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from trimtab_server.api.renaming import EventRenaming, event_paths, rename
from trimtab_server.api.request_log import exchange_of
from trimtab_server.engines.client import Answer
from trimtab_server.engines.messages import Call
from trimtab_server.engines.pool import Model
from trimtab_server.errors import CLIENT_CLOSED_REQUEST, ApiError, body_for, is_anthropic, translated

Result = TypeVar("Result")
HeaderPairs = Iterable[tuple[bytes, bytes]]


def call_of(request: Request, body: bytes | BinaryIO, *, uncompressed: bool = False) -> Call:
    """The request as a worker is to get it; `uncompressed`: such that its answer is not compressed."""
    target = request.scope["raw_path"].decode("latin-1")
    if query := request.scope["query_string"].decode("latin-1"):
        target += f"?{query}"
    headers = request.headers.raw
    if uncompressed:
        headers = [pair for pair in headers if pair[0] != b"accept-encoding"]
    return Call(request.method, target, headers, body)


async def relay(request: Request, model: Model, body: bytes | BinaryIO) -> Response:
    """Send the request on to a worker of `model`.

    Raises:
        WorkerUnavailableError, WorkerFailedError, WorkerTimeoutError: as of `Model.send`.
        ClientDisconnect: the client went away before the answer began.
    """
    model.require_ready()
    return await _unless_disconnected(request, _answered(request, model, body))


async def relay_in_turn(
    request: Request,
    model: Model,
    prepare: Callable[[], Awaitable[bytes]],
    extra_headers: HeaderPairs,
) -> Response:
    """Send a request that is limited on to a worker of `model`, when its turn has come.

    Within its turn it is prepared, so that the work for requests is limited as they are. A client that goes
    away leaves the queue, ends the preparation, or closes the worker's connection, at once.

    Args:
        request: as the client sent it.
        model: who gets it.
        prepare: makes the body that the worker gets.
        extra_headers: of the answer.

    Raises:
        RateLimitError: the queue is full.
        ApiError: as of `prepare`.
        WorkerUnavailableError, WorkerFailedError, WorkerTimeoutError: as of `Model.send`.
        ClientDisconnect: the client went away before the answer began.
    """
    model.require_ready()
    return await _unless_disconnected(request, _answered_in_turn(request, model, prepare, extra_headers))


async def _answered_in_turn(
    request: Request, model: Model, prepare: Callable[[], Awaitable[bytes]], extra_headers: HeaderPairs
) -> Response:
    with ExitStack() as held:
        await model.take_turn(held)
        return await _answered(request, model, await prepare(), extra_headers, held)


async def _answered(
    request: Request,
    model: Model,
    body: bytes | BinaryIO,
    extra_headers: HeaderPairs = (),
    held: ExitStack | None = None,
) -> Response:
    """Return the worker's answer; `held` is given back when it has been passed on."""
    exchange = exchange_of(request)
    path = request.scope["path"]
    names = None if exchange.alias is None else (model.name, exchange.alias)
    call = call_of(request, body, uncompressed=names is not None or is_anthropic(path))
    answer = await model.send(call, exchange.request_id)
    if held is not None:
        answer.held.push(held.pop_all())
    is_renamed = names is not None and answer.is_json
    is_translated = is_anthropic(path) and answer.is_json and answer.status >= HTTPStatus.BAD_REQUEST
    if not answer.has_length and not (is_renamed or is_translated):
        return _Relayed(answer, request, names, extra_headers)
    try:
        content = await answer.read()
    finally:
        answer.close()
    headers = answer.headers
    if (
        is_translated
    ):  # vLLM's own errors there have OpenAI's shape, or kinds that Anthropic's API does not have
        content = translated(path, exchange.request_id, answer.status, content)
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
    """An answer whose length nobody knows, on its way through."""

    def __init__(
        self,
        answer: Answer,
        request: Request,
        names: tuple[str, str] | None,
        extra_headers: HeaderPairs,
    ) -> None:
        super().__init__(self._pieces(), answer.status)
        self.raw_headers = [*answer.headers, *extra_headers]
        self._answer = answer
        self._exchange = exchange_of(request)
        self._path = request.scope["path"]
        self._renaming = None
        if names is not None and answer.is_event_stream:
            self._renaming = EventRenaming(*names, event_paths(self._path))
        self._settled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
            if not self._settled:
                self._exchange.status = CLIENT_CLOSED_REQUEST

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._answer.pieces():
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
