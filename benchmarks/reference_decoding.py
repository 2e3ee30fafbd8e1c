"""Cross-model control as its authors' own loop does it: one request at a time, in plain transformers.

The target has transformers' KV cache. So has the control, until a generated token is none of the control's:
then the generated text is tokenized anew, and the control's cache is dropped. The shift goes from the
control's row to the target's by one gather and one indexed addition.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_mappings import ByteEncoder, MappingTable, Vocabulary


class CachedModel:
    """A model and the cache of what it has read."""

    def __init__(self, directory: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.forget()

    def forget(self) -> None:
        self._cache = None
        self._row: Tensor | None = None

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor | None:
        """The logits [vocabulary] after `tokens`, which follow what was read before; None after nothing."""
        if tokens:
            output = self._model(
                torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            self._cache, self._row = output.past_key_values, output.logits[0, -1]
        return self._row


@dataclass
class Context:
    """What the target has generated, in the control's tokens; text between special tokens by itself."""

    target: Vocabulary
    encoder: ByteEncoder
    table: MappingTable
    tokens: list[int] = field(default_factory=list)
    realignments: int = 0
    """How often text was tokenized anew."""
    _text: bytes = b""
    _start: int = 0
    """Where the tokens of `_text` begin."""
    _waits: bool = False
    """Whether `_text` ends within a character."""

    def append(self, token: int) -> bool:
        """Take in a target token.

        Returns:
            Whether the tokens before it may have changed.
        """
        if token >= len(self.table.mapping):  # logits past the tokenizer
            return False
        if token in self.target.special:
            return self._end_text(int(self.table.mapping[token]))
        self._text += self.target.tokens[token]
        if self.table.exact[token] and not self._waits:
            self.tokens.append(int(self.table.mapping[token]))
            return False
        ids, waiting = self.encoder.encode(self._text)
        self._replace(ids)
        self._waits = bool(waiting)
        return True

    def _end_text(self, counterpart: int) -> bool:
        changed = self._waits
        if changed:
            self._replace(self.encoder.encode_all([self._text])[0])
        if counterpart >= 0:
            self.tokens.append(counterpart)
        self._text, self._start, self._waits = b"", len(self.tokens), False
        return changed

    def _replace(self, ids: list[int]) -> None:
        self.tokens[self._start :] = ids
        self.realignments += 1


@dataclass(frozen=True)
class Decoded:
    """One answer of the reference."""

    tokens: list[int]
    step: float
    """Seconds for each token after the first."""
    realignments: int


class ReferenceDecoder:
    """A target under a control, with strength 1."""

    def __init__(
        self,
        target: CachedModel,
        control: CachedModel,
        vocabulary: Vocabulary,
        encoder: ByteEncoder,
        table: MappingTable,
    ) -> None:
        self._target, self._control = target, control
        self._vocabulary, self._encoder, self._table = vocabulary, encoder, table
        mapping = torch.from_numpy(table.mapping.astype("int64"))
        self._where = torch.nonzero(mapping >= 0)[:, 0]
        self._mapped = mapping[self._where]

    def control_prompt(self, prompt: list[int]) -> list[int]:
        """The text of the target's prompt, as the control's tokenizer would have it."""
        text = b"".join(self._vocabulary.tokens[token] for token in prompt).decode(errors="replace")
        tokens: list[int] = self._encoder.tokenizer(text.removeprefix(" ")).input_ids
        return tokens

    def decode(self, prompt: list[int], own_prompt: list[int], count: int, *, greedy: bool) -> Decoded:
        """Generate `count` tokens after `prompt`; the control reads `own_prompt`."""
        self._target.forget()
        self._control.forget()
        context = Context(self._vocabulary, self._encoder, self._table)
        tokens: list[int] = []
        times: list[float] = []
        unread, changed = own_prompt, False
        while len(tokens) < count:
            if changed:
                self._control.forget()
                unread = own_prompt + context.tokens
            logits = self._shifted(self._target.read(tokens[-1:] or prompt), self._control.read(unread))
            tokens.append(_choose(logits, greedy=greedy))
            length = len(context.tokens)
            changed = context.append(tokens[-1])
            unread = context.tokens[length:]
            times.append(time.perf_counter())
        step = (times[-1] - times[0]) / max(count - 1, 1)
        return Decoded(tokens, step, context.realignments)

    def _shifted(self, logits: Tensor | None, row: Tensor | None) -> Tensor:
        """Tokens without a counterpart get the mean of the shift: taken from all others, it is nothing."""
        if logits is None:
            raise ValueError("the prompt is empty")
        if row is None:
            return logits
        shift = row[self._mapped]
        return logits.clone().index_add_(0, self._where, shift - shift.mean())


def _choose(logits: Tensor, *, greedy: bool) -> int:
    if greedy:
        return int(logits.argmax())
    return int(torch.multinomial(logits.softmax(dim=0), 1))
