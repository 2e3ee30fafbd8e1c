"""Records in token ids, with a mask over what is learned, and the batches that they are put together in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab_mappings import ByteEncoder, read_vocabulary
from trimtab_training.control.formats import DataError, Message, Record
from trimtab_training.control.top_log_probs import TopLogProbs

PAD_MULTIPLE = 16
"""Widths of batches are multiples of this: kernels are prepared again for every new shape."""


@dataclass(frozen=True)
class View:
    """What a model reads, and which of it is answers.

    ids: token ids.
    positions: the places in `ids` of the answers' tokens, in ascending order, each at least 1.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def targets(self) -> list[int]:
        """The answers' tokens."""
        return [self.ids[position] for position in self.positions]


@dataclass(frozen=True)
class Example:
    """A record to be trained on.

    view: what control and template read.
    teacher: what the template reads in its place if it is the teacher.
    taught: the distributions at the answer's tokens that another teacher gave.
    """

    view: View
    teacher: View | None = None
    taught: TopLogProbs | None = None


@dataclass(frozen=True)
class Batch:
    """Views side by side.

    ids: int64 [views, width], padded on the right, so that causal attention needs no mask.
    rows, columns: int64 [tokens], where the logits of each answer token are.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor


def collate(views: Sequence[View], pad_id: int) -> Batch:
    width = -(-max(len(view.ids) for view in views) // PAD_MULTIPLE) * PAD_MULTIPLE
    return Batch(
        ids=torch.tensor([[*view.ids, *[pad_id] * (width - len(view.ids))] for view in views]),
        rows=torch.tensor([row for row, view in enumerate(views) for _ in view.positions]),
        columns=torch.tensor([position - 1 for view in views for position in view.positions]),
    )


class ExampleEncoder:
    """Encodes records for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.shortened = 0
        """The number of views whose answers were cut at `max_length`."""

    def views(self, record: Record, system_prompt: str | None = None) -> list[View]:
        """The views of a record: one, unless the chat template renders a history in another way.

        Args:
            record: what was read.
            system_prompt: put before the conversation, or in place of its own.

        Raises:
            DataError: the chat template is missing or fails, a prompt is too long, or nothing can be learned.
        """
        if record.messages is None:
            pieces = [(record.prompt, False), (record.completion, True)]
            return [self._view(record, pieces, self._start, ends=True)]
        messages = with_system(record.messages, system_prompt)
        return [self._view(record, pieces, (), ends=ends) for pieces, ends in self._pieces(record, messages)]

    def question(self, record: Record, system_prompt: str | None = None) -> tuple[int, ...]:
        """The prompt of a conversation without its answer; `system_prompt` as in `views`.

        Raises:
            DataError: the chat template is missing or fails, or the prompt is too long.
        """
        text = self._render(record, with_system(record.messages or (), system_prompt), prompt=True)
        ids = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
        self._require_room(record, len(ids))
        return ids

    def answer(self, record: Record, text: str, *, ended: bool) -> View:
        """The view of a conversation without its answer, and of an answer to it, which alone is learned.

        Args:
            record: the conversation.
            text: the answer.
            ended: whether its end is learned too; else it was cut.
        """
        messages = [*(record.messages or ()), {"role": "assistant", "content": text}]
        *_, (pieces, ends) = self._pieces(record, messages)
        earlier = [(piece, False) for piece, _ in pieces[:-1]]
        last = (pieces[-1][0] if ended else text, True)
        return self._view(record, [*earlier, last], (), ends=ends and ended)

    def room(self, prompt: int) -> int:
        """The maximum length of an answer behind a prompt of that length."""
        return self._max_length - prompt

    def _pieces(
        self, record: Record, messages: Sequence[Message]
    ) -> Iterator[tuple[list[tuple[str, bool]], bool]]:
        """The rendered conversation in pieces, each learned or not, and whether an end is to be added."""
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self._render(record, messages[:turn], prompt=True) for turn in turns]
        wholes = [self._render(record, messages[: turn + 1], prompt=False) for turn in turns]
        pieces: list[tuple[str, bool]] = []
        text, ended = "", False
        for turn, prompt, whole in zip(turns, prompts, wholes, strict=True):
            if not whole.startswith(prompt) or not prompt.startswith(text):
                break
            answer, ended = self._until_end(whole[len(prompt) :], messages[turn]["content"])
            pieces += [(prompt[len(text) :], False), (answer, True)]
            text = prompt + answer
        else:
            yield pieces, not ended
            return
        for turn, prompt in zip(turns, prompts, strict=True):
            yield [(prompt, False), (messages[turn]["content"], True)], True

    def _render(self, record: Record, messages: Sequence[Message], *, prompt: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{record.place} is a conversation, and the tokenizer has no chat template."
                " Set `chat_template`, or use the format `prompt_completion`"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is data, and fails in any way it likes
            raise DataError(f"{record.place}: the chat template can't render it: {error}") from error
        return text

    def _until_end(self, rendered: str, content: str) -> tuple[str, bool]:
        """The rendered answer up to the special token that ends it, and whether there is one."""
        start = rendered.find(content.strip())
        end = start + len(content.strip()) if start >= 0 else len(rendered.rstrip())
        special = self._specials and self._specials.match(rendered, end)
        return (rendered[: special.end()], True) if special else (rendered[:end], False)

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        """Any special token, behind any spaces."""
        tokens = sorted(self._special_ids, key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, tokens))})") if tokens else None

    @cached_property
    def _special_ids(self) -> Mapping[str, int]:
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """What the tokenizer puts before every plain text."""
        eos = self._tokenizer.eos_token_id
        return tuple(token for token in self._tokenizer("").input_ids if token != eos)

    def _view(
        self, record: Record, pieces: Sequence[tuple[str, bool]], start: Sequence[int], *, ends: bool
    ) -> View:
        ids, positions, text = list(start), list[int](), ""
        for piece, learned in pieces:
            text += piece
            longer = [*start, *self._tokenizer(text, add_special_tokens=False).input_ids]
            if longer[: len(ids)] != ids:  # a token reaches from one piece into the next
                longer = [*ids, *self._continuation(piece)]
            if learned:
                positions += range(max(len(ids), 1), len(longer))
            ids = longer
        if ends:
            ids.append(self._tokenizer.eos_token_id)
            positions.append(len(ids) - 1)
        return self._fitted(record, View(tuple(ids), tuple(positions)))

    def _continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows another one: their bytes, joined, are its own."""
        ids: list[int] = []
        alternatives = "|".join(re.escape(token) for token in self._special_ids)
        for part in re.split(f"({alternatives})", text) if alternatives else [text]:
            special = self._special_ids.get(part)
            ids += self.byte_encoder.encode_all([part.encode()])[0] if special is None else [special]
        return ids

    @cached_property
    def byte_encoder(self) -> ByteEncoder:
        """Encodes bytes in the tokenizer's tokens."""
        return ByteEncoder(self._tokenizer, read_vocabulary(self._tokenizer, name="template"))

    def _fitted(self, record: Record, view: View) -> View:
        """Cut a view at the maximum length."""
        prompt = view.positions[0] if view.positions else len(view.ids)
        if prompt >= self._max_length:
            raise DataError(
                f"{record.place}: its prompt has {prompt} tokens, and `max_length` is {self._max_length},"
                " which leaves none for an answer. Raise `max_length` or shorten the prompt"
            )
        if not view.positions:
            raise DataError(f"{record.place}: its answer has no tokens")
        if len(view.ids) <= self._max_length:
            return view
        self.shortened += 1
        kept = tuple(position for position in view.positions if position < self._max_length)
        return View(view.ids[: self._max_length], kept)

    def _require_room(self, record: Record, prompt: int) -> None:
        if prompt >= self._max_length:
            raise DataError(
                f"{record.place}: its prompt has {prompt} tokens, and `max_length` is {self._max_length},"
                " which leaves none for an answer. Raise `max_length` or shorten the prompt"
            )


def answered(prompt: Sequence[int], answer: Sequence[int]) -> View:
    """The view of an answer in tokens."""
    return View((*prompt, *answer), tuple(range(len(prompt), len(prompt) + len(answer))))


def marked_text(view: View, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a view, with each learned token in brackets."""
    learned = set(view.positions)
    pieces = []
    for place, token in enumerate(view.ids):
        text = tokenizer.decode([token])
        pieces.append(f"[{text}]" if place in learned else text)
    return "".join(pieces)


def with_system(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    if system_prompt is None:
        return messages
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *rest]
