"""Answers that a template gives itself: greedy, and kept on disk for other runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

Prompt = tuple[int, ...]
Generate = Callable[[Sequence[Prompt], int], list[list[int]]]
"""Gives an answer of at most so many tokens to each prompt, all as token ids."""
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
_BATCH = 16
_KEPT = 64  # answers in a file


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, prompts: Sequence[Prompt], max_new_tokens: int, pad_id: int
) -> list[list[int]]:
    """The likeliest tokens behind each prompt, up to the end-of-sequence token, which is kept."""
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(prompts), _BATCH):
        places = longest_first[start : start + _BATCH]
        answers |= dict(
            zip(places, _batch(model, [prompts[i] for i in places], max_new_tokens, pad_id), strict=True)
        )
    return [answers[place] for place in range(len(prompts))]


def _batch(
    model: PreTrainedModel, prompts: Sequence[Prompt], max_new_tokens: int, pad_id: int
) -> Iterator[list[int]]:
    width = max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    ids = [[*[pad_id] * left, *prompt] for left, prompt in zip(missing, prompts, strict=True)]
    mask = [[*[0] * left, *[1] * (width - left)] for left in missing]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
    )
    ends = _ends(model)
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        yield row[: end + 1]


def _ends(model: PreTrainedModel) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def kept_answers(
    directory: Path, fingerprint: str, generate: Callable[[Sequence[Asked], int], list[Answer]]
) -> Callable[[Sequence[Asked], int], list[Answer]]:
    """Wrap `generate`, so that what it gave is read from `directory` the next time.

    Questions and answers must be JSON; `fingerprint` tells those who answer apart.
    """

    def read_or_generate(prompts: Sequence[Asked], max_new_tokens: int) -> list[Answer]:
        parts = [prompts[start : start + _KEPT] for start in range(0, len(prompts), _KEPT)]
        return [answer for part in parts for answer in read_or_generate_part(part, max_new_tokens)]

    def read_or_generate_part(prompts: Sequence[Asked], max_new_tokens: int) -> list[Answer]:
        contents = json.dumps([fingerprint, max_new_tokens, list(prompts)])
        path = directory / f"{hashlib.sha256(contents.encode()).hexdigest()}.json"
        if path.is_file():
            found: list[Answer] = json.loads(path.read_bytes())
            return found
        answers = generate(prompts, max_new_tokens)
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(answers), encoding="utf-8")
        unfinished.rename(path)
        return answers

    return read_or_generate
