"""Request bodies, read within limits: into memory, or large ones into temporary files."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, BinaryIO, TypeVar

from fastapi import Request

from trimtab_server.api.byte_budget import ByteBudget, Reservation
from trimtab_server.api.json_body import JsonObject, parse_object
from trimtab_server.config.schema import Settings
from trimtab_server.errors import BodyTooLargeError, OverloadedError, RequestTimeoutError
from trimtab_server.protocol import SMALL_BODY_BYTES

_ROOM_SECONDS = 30
"""How long a request waits for room for its body."""
_PIECE_SECONDS = 30
"""How long a client may pause within a body."""
Result = TypeVar("Result")


class BodyReader:
    """Reads the bodies of all requests, such that those in memory at once stay within a limit."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.limits.body_bytes
        self._seconds = settings.timeouts.body
        self._budget = ByteBudget(max(settings.limits.body_bytes_total, self._limit))
        self._large = asyncio.Semaphore(1)

    async def read(self, request: Request, held: ExitStack) -> bytes:
        """Return the whole body, once there is room for it; `held` gives the room back.

        Raises:
            BodyTooLargeError: it has more than `limits.body_bytes`.
            RequestTimeoutError: it does not arrive within `timeouts.body`, or stops midway.
            OverloadedError: other bodies leave no room for it.
        """
        announced = self._announced(request)
        if announced <= SMALL_BODY_BYTES:
            return await self._read(request)
        reservation = await self._reserve(announced, held)
        body = await self._read(request)
        reservation.shrink(len(body) if len(body) > SMALL_BODY_BYTES else 0)
        return body

    async def read_to_file(self, request: Request, held: ExitStack) -> bytes | BinaryIO:
        """Return a body whose content the gateway does not need: a large one as a temporary file.

        Memory holds one piece of it at a time. `held` closes the file, and gives its room back.

        Raises:
            BodyTooLargeError, RequestTimeoutError, OverloadedError: as of `read`.
        """
        announced = self._announced(request)
        if announced <= SMALL_BODY_BYTES:
            return await self._read(request)
        await self._reserve(announced, held)
        file = held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - `held` closes it
        await self._receive(request, lambda piece: asyncio.to_thread(file.write, piece))
        await asyncio.to_thread(file.flush)
        return file

    async def _reserve(self, announced: int, held: ExitStack) -> Reservation:
        try:
            async with asyncio.timeout(_ROOM_SECONDS):
                reservation = await self._budget.reserve(announced)
        except TimeoutError as error:
            raise OverloadedError(
                f"Other requests leave no room for a body of {announced} bytes (limits.body_bytes_total)."
            ) from error
        held.callback(reservation.release)
        return reservation

    async def parse(self, body: bytes) -> JsonObject:
        """Return the JSON object in `body`.

        Raises:
            BadRequestError: as of `parse_object`.
        """
        return await self.run(len(body), lambda: parse_object(body))

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Return the result of work on a body of `size` bytes: for large ones it runs in a thread, one at a
        time, so that other requests go on.
        """
        if size <= SMALL_BODY_BYTES:
            return work()
        async with self._large:
            return await asyncio.to_thread(work)

    def _announced(self, request: Request) -> int:
        """The length that the request announces; without one, the most that it may have."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            raise self._too_large()
        if length.isdecimal():
            return int(length)
        return self._limit if "transfer-encoding" in request.headers else 0

    async def _read(self, request: Request) -> bytes:
        body = bytearray()

        async def add(piece: bytes) -> None:
            body.extend(piece)

        await self._receive(request, add)
        return bytes(body)

    async def _receive(self, request: Request, take: Callable[[bytes], Awaitable[Any]]) -> None:
        size = 0
        try:
            async with asyncio.timeout(self._seconds), asyncio.timeout(_PIECE_SECONDS) as pause:
                async for piece in request.stream():
                    pause.reschedule(asyncio.get_running_loop().time() + _PIECE_SECONDS)
                    size += len(piece)
                    if size > self._limit:
                        raise self._too_large()
                    await take(piece)
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"The body did not arrive within {self._seconds:g} s (timeouts.body), or stopped for"
                f" {_PIECE_SECONDS} s."
            ) from error

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body is larger than {self._limit} bytes (limits.body_bytes).")
