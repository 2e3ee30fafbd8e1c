"""Asks a running server the small world's questions over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from trimtab_training.world.evaluate import Question

AT_ONCE = 32
_TIMEOUT = aiohttp.ClientTimeout(total=120)

Asked = tuple[str, float, Question]
"""A model, a strength, and what it is asked."""


class AskError(RuntimeError):
    """The server did not answer a question; the message holds what it said instead."""


def ask_all(
    url: str, control: str, asked: Sequence[Asked], progress: Callable[[], None] = lambda: None
) -> list[str]:
    """The generated texts in the order of `asked`, of which `AT_ONCE` are under way at a time.

    Args:
        url: where the server is, without the path.
        control: the control's name.
        asked: strength 0 asks with the control off.
        progress: called after every answer.

    Raises:
        AskError: the server refused a request, or could not be reached.
    """
    return asyncio.run(_ask_all(url, control, asked, progress))


async def _ask_all(url: str, control: str, asked: Sequence[Asked], progress: Callable[[], None]) -> list[str]:
    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(url, connector=connector, timeout=_TIMEOUT) as session:

        async def ask(model: str, strength: float, question: Question) -> str:
            text = await _ask(session, question, request_body(model, control, strength, question))
            progress()
            return text

        return await asyncio.gather(*(ask(*each) for each in asked))


def request_body(model: str, control: str, strength: float, question: Question) -> dict[str, Any]:
    """What is sent: a chat with one message of the user, or a plain completion."""
    text = (
        {"messages": [{"role": "user", "content": question.text}]}
        if question.kind.is_chat
        else {"prompt": question.text}
    )
    return {
        "model": model,
        **text,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "control": {"name": control, "strength": strength} if strength else False,
    }


async def _ask(session: aiohttp.ClientSession, question: Question, body: Mapping[str, Any]) -> str:
    path = "/v1/chat/completions" if question.kind.is_chat else "/v1/completions"
    try:
        async with session.post(path, json=body) as response:
            if response.status != 200:
                raise AskError(f"{path} answered {response.status}: {(await response.text())[:500]}")
            choice = (await response.json())["choices"][0]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AskError(f"{path} did not answer: {error!r}") from error
    text: str | None = choice["message"]["content"] if question.kind.is_chat else choice["text"]
    return text or ""
