"""Log-likelihoods of given answers under a control.

For each token of an answer, the control reads the text of the tokens before it. In a foreign vocabulary this
text is encoded anew at every token: the end of a prefix may be spelled otherwise than the same place of the
whole answer. `reference.SlowReference` says the same without batches and caches, and the tests hold the two
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab_processors.runtime import Request
from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.target import LoadedTarget

LOGITS_BYTES = 2**29
"""Upper bound on the logits of one batch, unless one answer alone exceeds it."""


@dataclass(frozen=True)
class GivenAnswer:
    """A prompt, and the answer whose likelihood is wanted."""

    prompt: Sequence[int]
    answer: Sequence[int]
    """Target tokens, at least one."""
    control_prompt: Sequence[int] | None = None
    """None: the control reads the text of the target's prompt."""


class TokenScore(NamedTuple):
    """A token of an answer, after the prompt and the tokens before it."""

    log_prob: float
    is_greedy: bool
    """Whether it is the likeliest token."""


class TeacherForced:
    """A target, and the control that is applied to it."""

    def __init__(
        self, target: LoadedTarget, control: LoadedControl | None, logits_bytes: int = LOGITS_BYTES
    ) -> None:
        self._target = target
        self._control = control
        self._logits_bytes = logits_bytes

    def scores(
        self, items: Sequence[GivenAnswer], settings: Sequence[Setting]
    ) -> Iterator[tuple[list[int], list[list[list[TokenScore]]]]]:
        """Score all `items`, a batch at a time, which needs the target's forward once for all `settings`.

        Yields:
            The places of a batch's items, and their scores: [settings][items of the batch][answer tokens].
        """
        for places in self._batches(items):
            some = [items[place] for place in places]
            logits = self._logits(some)
            yield places, [self._scored(some, logits, setting) for setting in settings]

    def all_scores(
        self, items: Sequence[GivenAnswer], settings: Sequence[Setting]
    ) -> list[list[list[TokenScore]]]:
        """The scores of all items in their order: [settings][items][answer tokens]."""
        found: list[list[list[TokenScore]]] = [[[] for _ in items] for _ in settings]
        for places, scored in self.scores(items, settings):
            for of_setting, of_batch in zip(found, scored, strict=True):
                for place, each in zip(places, of_batch, strict=True):
                    of_setting[place] = each
        return found

    def _batches(self, items: Sequence[GivenAnswer]) -> Iterator[list[int]]:
        """Places of items of like length, whose logits fit into `logits_bytes` together."""
        order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), len(items[i].answer)))
        batch: list[int] = []
        for place in order:
            if batch and self._bytes([items[each] for each in (*batch, place)]) > self._logits_bytes:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _bytes(self, items: Sequence[GivenAnswer]) -> int:
        return len(items) * len(_columns(items)) * self._target.width * 4

    @torch.no_grad()
    def _logits(self, items: Sequence[GivenAnswer]) -> list[Tensor]:
        """The target's own logits before each answer token: float32 [answer tokens, width] of each item."""
        columns = _columns(items)
        width = max(len(item.prompt) + len(item.answer) for item in items) - 1
        rows = [[*item.prompt, *item.answer][:-1] for item in items]
        ids = [[*row, *[self._target.pad] * (width - len(row))] for row in rows]  # causal: needs no mask
        logits = self._target.model(
            input_ids=torch.tensor(ids, device=self._target.device),
            use_cache=False,
            logits_to_keep=torch.tensor(columns, device=self._target.device),
        ).logits
        starts = [len(item.prompt) - 1 - columns.start for item in items]
        return [
            logits[row, start : start + len(item.answer)].float()
            for row, (item, start) in enumerate(zip(items, starts, strict=True))
        ]

    def _scored(
        self, items: Sequence[GivenAnswer], logits: Sequence[Tensor], setting: Setting
    ) -> list[list[TokenScore]]:
        if setting.routing is not None and self._control is not None:
            logits = _steered(self._control, items, logits, setting)
        return [_token_scores(each, item.answer) for each, item in zip(logits, items, strict=True)]


def _columns(items: Sequence[GivenAnswer]) -> range:
    """The positions whose logits are wanted for any of `items`."""
    first = min(len(item.prompt) for item in items) - 1
    return range(first, max(len(item.prompt) + len(item.answer) for item in items) - 1)


def _steered(
    control: LoadedControl, items: Sequence[GivenAnswer], logits: Sequence[Tensor], setting: Setting
) -> list[Tensor]:
    """A shifted copy of `logits`, one step of the runtime for each position of the answers."""
    shifted = [each.clone() for each in logits]
    outputs: list[list[int]] = [[] for _ in items]
    with control.encoding_prefixes():
        opened = [
            control.open(setting, [*item.prompt], item.control_prompt, output)
            for item, output in zip(items, outputs, strict=True)
        ]
    for position in range(max(len(item.answer) for item in items)):
        active = [place for place, item in enumerate(items) if position < len(item.answer)]
        requests = {row: opened[place] for row, place in enumerate(active)}
        stacked = torch.stack([shifted[place][position] for place in active])
        _step(control, stacked, requests)
        for row, place in enumerate(active):
            shifted[place][position] = stacked[row]
            outputs[place].append(items[place].answer[position])
    control.close([request for request in opened if request is not None])
    return shifted


def _step(control: LoadedControl, logits: Tensor, requests: dict[int, Request | None]) -> None:
    of_rows = {row: (request,) for row, request in requests.items() if request is not None}
    control.runtime.step([request for (request,) in of_rows.values()])
    control.runtime.apply(logits, of_rows)


def _token_scores(logits: Tensor, answer: Sequence[int]) -> list[TokenScore]:
    """Args: logits float32 [answer tokens, width]."""
    tokens = torch.tensor(answer, device=logits.device)
    log_probs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    is_greedy = logits.argmax(dim=-1) == tokens
    return [TokenScore(*each) for each in zip(log_probs.tolist(), is_greedy.tolist(), strict=True)]
