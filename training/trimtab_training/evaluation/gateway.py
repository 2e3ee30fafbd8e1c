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
from trimtab_training.openai_api import UnreachableError, api_session, post
from trimtab_training.recipe_file import RecipeError

API_KEY_VARIABLE = "OPENAI_API_KEY"


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
        places = asyncio.Semaphore(self.requests_at_once)
        async with api_session(os.environ.get(API_KEY_VARIABLE)) as session:

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
        try:
            status, text = await post(session, url, self.body(question, setting))
        except UnreachableError as error:
            raise RecipeError(f"`gateway`: {error}") from error
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
