"""The controls' own prompts of a request, made in threads: they may be long, and other requests go on."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trimtab_processors.parameters import to_xargs
from trimtab_server.config.sections import Limits
from trimtab_server.controls.lanes import Lane
from trimtab_server.controls.prompts import Chat, PromptRenderer, extract_messages
from trimtab_server.controls.registry import ResolvedControls
from trimtab_server.engines.pool import ServedModel
from trimtab_server.errors import PromptTooLongError
from trimtab_server.protocol import SMALL_BODY_BYTES

Result = TypeVar("Result")


class Preparer:
    """Renders and tokenizes the prompts of controlled requests.

    Short requests have threads of their own, so that long ones hold up only each other. A request takes a
    turn for each step: when its client leaves, the running step ends, and no other begins.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._short = Lane("short-prompts", 2)
        self._long = Lane("long-prompts", 1)

    def chat(
        self, model: ServedModel, choices: ResolvedControls, path: str, body: Mapping[str, Any]
    ) -> Chat | None:
        """Return the conversation of a request, if its length does not rule it out: nothing is tokenized yet.

        Args:
            model: the model that gets the request.
            choices: its controls.
            path: the endpoint.
            body: the request's body.

        Returns:
            None if the endpoint has no conversation, or no control a chat template.

        Raises:
            BadRequestError: the messages are malformed.
            PromptTooLongError: the conversation is longer than the limits or the model's context allow.
        """
        if not any(choice.control.renderer for choice in choices):
            return None
        chat = extract_messages(path, body)
        if chat is not None:
            self._require_short(model, chat)
        return chat

    async def xargs(self, model: ServedModel, choices: ResolvedControls, chat: Chat | None) -> dict[str, Any]:
        """Return what the plugin is told of a request's controls.

        Args:
            model: the model that gets the request; models take turns.
            choices: the controls, at least one.
            chat: the conversation, for prompts of the controls' own; None: the target's prompt is theirs.

        Raises:
            BadRequestError: a control's template rejects the messages.
            PromptTooLongError: a prompt has more tokens than the limits allow.
        """
        parameters = []
        for choice in choices:
            prompt = None
            if chat is not None and choice.control.renderer is not None:
                prompt = await self._run(model, chat.size, self._encoding(choice.control.renderer, chat))
            parameters.append(choice.parameters(prompt))
        return to_xargs(parameters)

    def _require_short(self, model: ServedModel, chat: Chat) -> None:
        limit = self._limits.control_prompt_bytes
        if (size := chat.size) > limit:
            raise PromptTooLongError(
                f"The conversation has {size} bytes, more than {limit} (limits.control_prompt_bytes). It may"
                " be longer without control: `control: false`.",
                param=chat.param,
            )
        if model.prompt_bytes is not None and (size := chat.text_bytes) > model.prompt_bytes:
            raise PromptTooLongError(
                f"The conversation has {size} bytes, more than any prompt of {model.name!r}:"
                f" {model.prompt_bytes}, its context times its longest token.",
                param=chat.param,
            )

    def _encoding(self, renderer: PromptRenderer, chat: Chat) -> Callable[[], list[int]]:
        return lambda: renderer.encode(renderer.render(chat), self._limits.control_prompt_tokens, chat.param)

    async def _run(self, model: ServedModel, size: int, work: Callable[[], Result]) -> Result:
        if size <= SMALL_BODY_BYTES:
            return await self._short.run(model.name, work)
        return await self._long.run(model.name, lambda: _with_memory_returned(work))


def _with_memory_returned(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, and to the system what it used: glibc would keep a hundred megabytes."""
    try:
        return work()
    finally:
        with contextlib.suppress(AttributeError, OSError):  # another C library has no such function
            ctypes.CDLL(None).malloc_trim(0)
