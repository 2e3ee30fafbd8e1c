"""Greedy answers of a target under a control, in batches, by transformers. The control runs in the runtime
of the server's plugin, so that an answer is the one that a worker would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trimtab_processors.runtime import Request
from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.recipe import Question
from trimtab_training.evaluation.target import LoadedTarget
from trimtab_training.recipe_file import RecipeError

Item = TypeVar("Item")
Progress = Callable[[int], None]
"""Called with the number of answers that were added."""


@dataclass(frozen=True)
class Asked:
    """A question under a setting, encoded for the target and for the control."""

    prompt: list[int]
    control_prompt: list[int] | None
    """None: the control reads the text of the target's prompt."""
    setting: Setting


@dataclass
class Offline:
    """A target, and the control that is applied to it."""

    target: LoadedTarget
    control: LoadedControl | None
    max_new_tokens: int
    stop: Sequence[str] = ()
    batch_size: int = 16
    system_prompt: str | None = None
    progress: Progress = field(default=lambda _: None)

    def answers(self, questions: Sequence[Question], settings: Sequence[Setting]) -> list[list[str]]:
        """The answers to all `questions` under each of `settings`, in their order."""
        encoded = [self._encode(question) for question in questions]
        asked = [Asked(*prompts, setting) for setting in settings for prompts in encoded]
        order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))
        texts = [""] * len(asked)
        for places in batched(order, self.batch_size):
            answered = self.generate([asked[place] for place in places])
            for place, tokens in zip(places, answered, strict=True):
                texts[place] = cut(self.target.decode(tokens), self.stop)
            self.progress(len(places))
        return [list(row) for row in batched(texts, len(questions))]

    @torch.no_grad()
    def generate(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Generate the likeliest tokens after each prompt, in one batch."""
        width = max(len(each.prompt) for each in asked)
        pads = [width - len(each.prompt) for each in asked]
        rows = zip(asked, pads, strict=True)
        ids = [[*[self.target.pad] * missing, *each.prompt] for each, missing in rows]
        mask = [[*[0] * missing, *[1] * (width - missing)] for missing in pads]
        steering = _Steering(self.control, asked, self.target.ends, width)
        output = self.target.model.generate(
            input_ids=torch.tensor(ids, device=self.target.device),
            attention_mask=torch.tensor(mask, device=self.target.device),
            max_new_tokens=self.max_new_tokens,
            logits_processor=[steering] if self.control else [],
        )
        steering.close()
        return [up_to(row, self.target.ends) for row in output[:, width:].tolist()]

    def _encode(self, question: Question) -> tuple[list[int], list[int] | None]:
        prompt = self.target.encode(question, self.system_prompt)
        config = self.target.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit and len(prompt) + self.max_new_tokens > limit:
            raise RecipeError(
                f"`max_new_tokens`: {question.text[:60]!r} has a prompt of {len(prompt)} tokens; with"
                f" {self.max_new_tokens} more it exceeds the target's context of {limit}"
            )
        own = self.control.encode(question.chat(self.system_prompt)) if self.control else None
        return prompt, own


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the strings of `stop`."""
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]


def up_to(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return [*tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]]


class _Steering(LogitsProcessor):
    """Follows the generated tokens, and adds the control's shift to the scores of every step."""

    def __init__(
        self, control: LoadedControl | None, asked: Sequence[Asked], ends: Sequence[int], width: int
    ) -> None:
        self._control = control
        self._ends = ends
        self._seen = width
        self._outputs: list[list[int]] = [[] for _ in asked]
        self._requests: dict[int, tuple[Request, ...]] = {}
        if control is not None:
            for row, (each, output) in enumerate(zip(asked, self._outputs, strict=True)):
                if request := control.open(each.setting, each.prompt, each.control_prompt, output):
                    self._requests[row] = (request,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: input_ids int64 [rows, tokens]; scores float32 [rows, target vocabulary], which change."""
        for row, new in enumerate(input_ids[:, self._seen :].tolist()):
            self._outputs[row] += new
            if any(token in self._ends for token in new):
                self._close(row)
        self._seen = input_ids.shape[1]
        if self._control is not None and self._requests:
            self._control.runtime.step([request for of_row in self._requests.values() for request in of_row])
            self._control.runtime.apply(scores, self._requests)
        return scores

    def close(self) -> None:
        """Release the requests that have not ended."""
        for row in [*self._requests]:
            self._close(row)

    def _close(self, row: int) -> None:
        if self._control is not None:
            self._control.close(self._requests.pop(row, ()))


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Slices of `items`, each of `size` but for the last."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
