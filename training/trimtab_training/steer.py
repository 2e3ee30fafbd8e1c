"""Greedy generation with a control, in batches, with transformers alone: no server, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from trimtab_mappings import ByteEncoder, build_table, load_tokenizer, read_vocabulary
from trimtab_processors.alignment import Aligner, Alignment
from trimtab_processors.routing import PmMined
from trimtab_training.data import pad


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(directory: Path) -> Loaded:
    """Load the float32 model and the tokenizer in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return Loaded(model.eval(), load_tokenizer(str(directory)))


class Steered:
    """A target, and a control that is applied to it through a mapping table."""

    def __init__(self, target: Loaded, control: Loaded) -> None:
        self._target = target
        self._control = control
        vocabulary = read_vocabulary(target.tokenizer, name="target")
        encoder = ByteEncoder(control.tokenizer, read_vocabulary(control.tokenizer, name="control"))
        table = build_table(vocabulary, encoder)
        self._aligner = Aligner(vocabulary, encoder, table)
        self._routing = PmMined(table.mapping, target.model.config.vocab_size)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        control_prompts: Sequence[Sequence[int]],
        *,
        strength: float,
        max_tokens: int,
    ) -> list[str]:
        """Go on from each prompt with the likeliest tokens.

        Args:
            prompts: in the target's tokens.
            control_prompts: the same in the control's tokens.
            strength: the factor on the shift; 0 leaves the control out.
            max_tokens: the most tokens to generate.
        """
        pad_id = self._target.tokenizer.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[*[pad_id] * (width - len(prompt)), *prompt] for prompt in prompts])
        mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
        steering = _Steering(
            self._control, self._aligner, self._routing, control_prompts, width=width, strength=strength
        )
        with torch.no_grad():
            output = self._target.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                logits_processor=[steering] if strength else [],
            )
        return [self._text(row.tolist()) for row in output[:, width:]]

    def _text(self, tokens: list[int]) -> str:
        eos = self._target.tokenizer.eos_token_id
        end = tokens.index(eos) if eos in tokens else len(tokens)
        return self._aligner.text(tokens[:end]).decode("utf-8", errors="replace")


class _Steering(LogitsProcessor):
    """Adds the control's shift to the scores of every step; its contexts are computed from scratch."""

    def __init__(
        self,
        control: Loaded,
        aligner: Aligner,
        routing: PmMined,
        prompts: Sequence[Sequence[int]],
        *,
        width: int,
        strength: float,
    ) -> None:
        self._control = control
        self._routing = routing
        self._contexts = [Alignment(aligner, prompt) for prompt in prompts]
        self._seen = width
        self._strength = strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: input_ids int64 [requests, tokens], scores float32 [requests, target vocabulary]."""
        for context, new in zip(self._contexts, input_ids[:, self._seen :].tolist(), strict=True):
            context.extend(new)
        self._seen = input_ids.shape[1]
        return scores + self._strength * self._routing.shift(self._rows())

    def _rows(self) -> Tensor:
        """The control's logits after each context: float32 [requests, control vocabulary]."""
        contexts = [context.tokens for context in self._contexts]
        ids = pad(contexts, self._control.tokenizer.pad_token_id)
        last = torch.tensor([len(context) - 1 for context in contexts])
        hidden = self._control.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows: Tensor = self._control.model.get_output_embeddings()(hidden[torch.arange(len(last)), last])
        return rows
