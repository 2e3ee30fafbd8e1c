"""The same questions to a running gateway, by the OpenAI API with its key `control`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.recipe import Question
from trimtab_training.recipe_file import RecipeError

API_KEY_VARIABLE = "OPENAI_API_KEY"
_TIMEOUT = aiohttp.ClientTimeout(total=600)
_BUSY = (429, 503)
_TRIES = 20
_MAX_PAUSE_SECONDS = 60


@dataclass(frozen=True)
class Gateway:
    """A model that a gateway serves, and a control of that gateway."""

    url: str
    """The base URL, with `/v1`."""
    model: str
    control: str | None
    max_new_tokens: int
    stop: Sequence[str] = ()
    requests_at_once: int = 16
    system_prompt: str | None = None
    progress: Callable[[int], None] = lambda _: None

    def answers(self, questions: Sequence[Question], settings: Sequence[Setting]) -> list[list[str]]:
        """The answers to all `questions` under each of `settings`, in their order.

        Raises:
            RecipeError: the gateway can't be reached, or rejects a request.
        """
        return asyncio.run(self._answers(questions, settings))

    async def _answers(self, questions: Sequence[Question], settings: Sequence[Setting]) -> list[list[str]]:
        places = asyncio.Semaphore(
            self.requests_at_once
        )  # a connector's limit would count as the request's time
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT, headers=_authorization()
        ) as session:

            async def ask(question: Question, setting: Setting) -> str:
                async with places:
                    return await self._ask(session, question, setting)

            asked = (ask(question, setting) for setting in settings for question in questions)
            texts = await asyncio.gather(*asked)
        count = len(questions)
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    async def _ask(self, session: aiohttp.ClientSession, question: Question, setting: Setting) -> str:
        is_raw = question.chat(None) is None
        url = f"{self.url.rstrip('/')}/{'completions' if is_raw else 'chat/completions'}"
        status, text = await _post(session, url, self.body(question, setting))
        if status != 200:
            raise RecipeError(f"`gateway`: {url} answered {status}: {text[:500]}")
        try:
            choice = json.loads(text)["choices"][0]
            said = choice["text"] if is_raw else choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RecipeError(f"`gateway`: {url} answered without a choice: {text[:500]}") from error
        self.progress(1)
        return said or ""

    def body(self, question: Question, setting: Setting) -> dict[str, Any]:
        """A request for the likeliest tokens, whatever the model's generation config says."""
        chat = question.chat(self.system_prompt)
        return {
            "model": self.model,
            **({"prompt": question.prompt} if chat is None else {"messages": chat}),
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "stop": list(self.stop),
            "control": self._control(setting),
        }

    def _control(self, setting: Setting) -> Any:
        if setting.routing is None:
            return False
        return {"name": self.control, "strength": setting.strength, "routing": setting.routing}


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Return status and text of the answer. While the gateway is busy, wait for as long as it says."""
    for attempt in range(1, _TRIES + 1):
        try:
            async with session.post(url, json=body) as response:
                status, text = response.status, await response.text()
                pause = response.headers.get("retry-after", "1")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RecipeError(f"`gateway`: {url} can't be reached: {error!r}") from error
        if status not in _BUSY or attempt == _TRIES:
            break
        await asyncio.sleep(min(float(pause) if pause.isdecimal() else 1, _MAX_PAUSE_SECONDS))
    return status, text


def _authorization() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
