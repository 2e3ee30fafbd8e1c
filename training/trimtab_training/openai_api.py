"""Requests to a server of the OpenAI API."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

_BUSY = (429, 503)
_TRIES = 20
_MAX_PAUSE_SECONDS = 60
_TIMEOUT = aiohttp.ClientTimeout(total=600)


class UnreachableError(RuntimeError):
    """No server answers; the message names the URL and the reason."""


def api_session(key: str | None) -> aiohttp.ClientSession:
    """A session without a limit on connections: waiting for one would count as the request's time."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT, headers=headers)


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Return status and text of the answer. While the server is busy, wait for as long as it says.

    Raises:
        UnreachableError: there is no answer.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            async with session.post(url, json=body) as response:
                status, text = response.status, await response.text()
                pause = response.headers.get("retry-after", "1")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(f"{url} can't be reached: {error!r}") from error
        if status not in _BUSY or attempt == _TRIES:
            break
        await asyncio.sleep(min(float(pause) if pause.isdecimal() else 1, _MAX_PAUSE_SECONDS))
    return status, text
