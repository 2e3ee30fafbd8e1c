"""Answers of a teacher behind an OpenAI-compatible server, with the likeliest tokens at each of theirs."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from trimtab_training.control.errors import TrainingError
from trimtab_training.control.formats import Message
from trimtab_training.control.generate import kept_answers
from trimtab_training.control.recipe import DataSet, Teacher
from trimtab_training.openai_api import UnreachableError, api_session, post

Conversation = Sequence[Message]
Choice = dict[str, Any]
"""An answer as the API writes it: an item of `choices`."""
Teach = Callable[[DataSet, Sequence[Conversation]], list[Choice]]
"""Gives the answers of a data set's teacher to conversations."""


@dataclass(frozen=True)
class TeacherServer:
    """A model behind a server. `scores`: whether log-probabilities are asked for."""

    teacher: Teacher
    scores: bool

    @property
    def fingerprint(self) -> str:
        """What its answers depend on, besides the question."""
        keys = {"base_url", "model", "control", "top_logprobs"}
        return json.dumps([self.teacher.model_dump(mode="json", include=keys), self.scores], sort_keys=True)

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Choice]:
        """The likeliest answer to each conversation, in their order.

        Raises:
            TrainingError: the server can't be reached, or rejects a request.
        """
        return asyncio.run(self._answers(conversations, max_new_tokens))

    async def _answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Choice]:
        places = asyncio.Semaphore(self.teacher.requests_at_once)
        async with api_session(self._key()) as session:

            async def ask(conversation: Conversation) -> Choice:
                async with places:
                    return await self._ask(session, self.body(conversation, max_new_tokens))

            return await asyncio.gather(*map(ask, conversations))

    def _key(self) -> str | None:
        variable = self.teacher.api_key_env
        if variable is None:
            return None
        key = os.environ.get(variable)
        if not key:
            raise TrainingError(f"`teacher.api_key_env`: the environment variable {variable} is not set")
        return key

    def body(self, conversation: Conversation, max_new_tokens: int) -> dict[str, Any]:
        """A request for the likeliest tokens."""
        teacher = self.teacher
        return {
            "model": teacher.model,
            "messages": list(conversation),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": teacher.top_logprobs} if self.scores else {}),
            **({} if teacher.control is None else {"control": teacher.control}),
        }

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Choice:
        url = f"{str(self.teacher.base_url).rstrip('/')}/chat/completions"
        try:
            status, text = await post(session, url, body)
        except UnreachableError as error:
            raise TrainingError(
                f"`teacher.base_url`: {error}. Start the server, or correct the URL"
            ) from error
        if status == 404:
            raise TrainingError(
                f"`teacher.model`: {url} answered 404 for {self.teacher.model!r}: {text[:500]}."
                " Take a name that the server's `/models` lists"
            )
        if status != 200:
            raise TrainingError(f"`teacher`: {url} answered {status}: {text[:500]}")
        try:
            choice: Choice = json.loads(text)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise TrainingError(f"`teacher`: {url} answered without a choice: {text[:500]}") from error
        return choice


def kept_teaching(directory: Path) -> Teach:
    """Ask the teachers of data sets, and read from `directory` what they have answered before."""

    def teach(data_set: DataSet, conversations: Sequence[Conversation]) -> list[Choice]:
        assert data_set.server is not None  # noqa: S101 - only such data sets are taught
        server = TeacherServer(data_set.server, scores=data_set.objective == "distill")
        ask = kept_answers(directory, server.fingerprint, server.answers)
        return ask([list(conversation) for conversation in conversations], data_set.max_new_tokens)

    return teach
