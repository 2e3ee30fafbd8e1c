"""A slow reference of controlled decoding: transformers only, one request, no cache, nothing shared with
Trimtab.

Written from the definitions alone: PM-MinED by comparing all pairs, a context that is tokenized anew from its
beginning at every token, one full forward pass of both models for every token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SPECIALS = {"<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others follow from
    256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Model:
    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @cached_property
    def bytes(self) -> list[bytes | None]:
        """Each token's bytes, None for specials."""
        spellings = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        byte_level = any("Ġ" in spelling for spelling in spellings)
        alphabet = byte_alphabet()
        return [
            None
            if s in SPECIALS
            else bytes(alphabet[c] for c in s)
            if byte_level
            else s.replace("▁", " ").encode()
            for s in spellings
        ]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.network(torch.tensor([tokens])).logits[0, -1].float()


def distance(left: bytes, right: bytes) -> int:
    try:
        return abs(len(left.decode()) - len(right.decode()))
    except UnicodeDecodeError:
        return abs(len(left) - len(right))


def pm_mined(target: Model, control: Model) -> list[int]:
    by_role = {
        target.tokenizer.bos_token_id: control.tokenizer.bos_token_id,
        target.tokenizer.eos_token_id: control.tokenizer.eos_token_id,
        target.tokenizer.pad_token_id: control.tokenizer.pad_token_id,
        target.tokenizer.unk_token_id: control.tokenizer.unk_token_id,
    }
    candidates = [(i, data) for i, data in enumerate(control.bytes) if data]
    table = []
    for token, data in enumerate(target.bytes):
        best, least = -1, 10**9
        if data is None:
            best = by_role.get(token)
            best = -1 if best is None else best
        for i, other in candidates if data else ():
            fits = data.startswith(other) or other.startswith(data)
            blank = other == b" " and data.strip(b" ")
            if fits and not blank and (d := distance(data, other)) < least:
                best, least = i, d
        table.append(best)
    return table


@dataclass
class Step:
    token: int
    gap: float
    """How far the best logit is above the second."""


class Reference:
    """One target under one control; `strength` 0 is the target alone."""

    def __init__(self, target: Model, control: Model) -> None:
        self.target, self.control = target, control
        self.mapping = pm_mined(target, control)
        self.spelled = {data: i for i, data in reversed(list(enumerate(control.bytes))) if data}

    def tokenize(self, data: bytes) -> list[int]:
        """Text for the control: valid stretches as text, bytes that can't be text one by one, the unfinished
        end later."""
        text = data.decode("utf-8", errors="surrogateescape")
        ids: list[int] = []
        for stretch in re.findall(r"[\udc80-\udcff]|[^\udc80-\udcff]+", text):
            raw = stretch.encode("utf-8", errors="surrogateescape")
            if "\udc80" <= stretch <= "\udcff":
                ids.append(self.spelled[raw])
            else:
                ids += self.control.tokenizer.encode(stretch, add_special_tokens=False)
        return ids

    def contexts(self, generated: list[int]) -> Iterator[list[int]]:
        """The control's tokens for nothing, for the first generated token, for the first two, and so on."""
        done: list[int] = []
        run: list[int] = []
        text, waiting = b"", b""
        yield []
        for token in generated:
            data = self.target.bytes[token] if token < len(self.target.bytes) else b""
            if data is None:
                done += run if not waiting else self.tokenize(text)
                done += [self.mapping[token]] if self.mapping[token] >= 0 else []
                run, text, waiting = [], b"", b""
            elif token < len(self.target.bytes):
                text += data
                if (
                    not waiting
                    and self.mapping[token] >= 0
                    and self.control.bytes[self.mapping[token]] == data
                ):
                    run = [*run, self.mapping[token]]
                else:
                    waiting = unfinished(text)
                    run = self.tokenize(text[: len(text) - len(waiting)])
            yield done + run

    def shift(self, context: list[int]) -> torch.Tensor:
        row = self.control.logits(context)
        routed = torch.full((self.target.network.config.vocab_size,), -1)
        routed[: len(self.mapping)] = torch.tensor(self.mapping)
        neutral = row[routed[routed >= 0]].mean()
        return torch.where(routed >= 0, row[routed], neutral)

    def steps(
        self, prompt: list[int], own_prompt: list[int], strength: float, forced: list[int]
    ) -> Iterator[Step]:
        """For each token of `forced`, what greedy decoding would have chosen after the ones before it."""
        for position, context in enumerate(islice(self.contexts(forced), len(forced))):
            logits = self.target.logits(prompt + forced[:position])
            if strength:
                logits = logits + strength * self.shift(own_prompt + context)
            best = logits.topk(2)
            yield Step(int(best.indices[0]), float(best.values[0] - best.values[1]))


def unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character without ending it."""
    for length in (3, 2, 1):
        tail = data[-length:]
        # Only the third byte tells a decoder that this is half of a surrogate pair, which UTF-8 lacks.
        if len(tail) == 2 and tail[0] == 0xED and 0xA0 <= tail[1] <= 0xBF:
            return tail
        for filler in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0", b"\xa0\x80", b"\x90\x80\x80"):
            try:
                if len(tail) == length and len((tail + filler).decode()) == 1 and tail[0] >= 0xC0:
                    return tail
            except UnicodeDecodeError:
                continue
    return b""
