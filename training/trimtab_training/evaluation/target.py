"""The model that is asked: loading it, and its prompts and the control's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab_mappings import load_tokenizer
from trimtab_mappings.loading import generation_eos
from trimtab_mappings.vocabulary import VocabularyError
from trimtab_processors.alignment import common_prefix
from trimtab_training.evaluation.recipe import Question, TargetSettings, is_file_name
from trimtab_training.recipe_file import RecipeError

Chat = Sequence[Mapping[str, str]]


class Encoded(NamedTuple):
    """A prompt and an answer as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class LoadedTarget:
    """A model, its tokenizer, and how it is prompted."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    """None: the tokenizer's own."""
    ends: tuple[int, ...]
    """The tokens that end an answer."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.model.device)

    @property
    def width(self) -> int:
        """The number of its logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def pad(self) -> int:
        """The token that fills prompts up; attention masks it."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0])

    def encode(self, question: Question, system_prompt: str | None = None) -> list[int]:
        """A question's prompt as token ids, as vLLM encodes it."""
        chat = question.chat(system_prompt)
        if chat is None:
            return list(self.tokenizer(question.prompt).input_ids)
        return render(self.tokenizer, chat, self.chat_template)

    def encode_with_answer(
        self, question: Question, answer: str, system_prompt: str | None = None
    ) -> Encoded:
        """A question and its answer, encoded as one text, and an end of text. What is encoded alike with and
        without the answer is the prompt.
        """
        prompt = self.encode(question, system_prompt)
        chat = question.chat(system_prompt)
        text = question.prompt if chat is None else render_text(self.tokenizer, chat, self.chat_template)
        whole = self.tokenizer(f"{text}{answer}", add_special_tokens=chat is None).input_ids
        end = self.tokenizer.eos_token_id
        ids = [*whole, *([] if end is None or whole[-1:] == [end] else [end])]
        count = min(common_prefix(prompt, ids), len(ids) - 1)
        return Encoded(ids[:count], ids[count:])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, as vLLM decodes it."""
        text: str = self.tokenizer.decode(
            [*tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load_target(settings: TargetSettings) -> LoadedTarget:
    """Load the model. Its generation config counts only for the tokens that end an answer: what is generated
    is the likeliest token at every step.

    Raises:
        RecipeError: it can't be loaded, or conversations can't be rendered for it.
    """
    name = settings.model_name_or_path
    device = _device(settings.device)
    try:
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, settings.dtype), trust_remote_code=False
        )
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError, VocabularyError) as error:
        raise RecipeError(f"`target.model_name_or_path`: {name!r} can't be loaded: {error}") from error
    own_end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = tuple(dict.fromkeys([*own_end, *generation_eos(name)])) or (-1,)
    model.generation_config = GenerationConfig(
        eos_token_id=[*ends], pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    )
    return LoadedTarget(name, model, tokenizer, read_template(settings.chat_template), ends)


def read_template(template: str | None) -> str | None:
    """A chat template itself, or the text of the file that `template` names.

    Raises:
        RecipeError: the file can't be read.
    """
    if template is None or not is_file_name(template):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"`target.chat_template`: {template} can't be read: {error}") from error


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, template: str | None) -> list[int]:
    """A conversation in a chat template, as token ids.

    Raises:
        RecipeError: there is no template, or it refuses the conversation.
    """
    text = render_text(tokenizer, chat, template)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def render_text(tokenizer: PreTrainedTokenizerBase, chat: Chat, template: str | None) -> str:
    """A conversation in a chat template, up to where the answer begins.

    Raises:
        RecipeError: there is no template, or it refuses the conversation.
    """
    if template is None and tokenizer.chat_template is None:
        raise RecipeError(
            "`target.chat_template` is missing: the target's tokenizer has no chat template. Set one, or ask"
            " with `prompt` instead of `question`"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(turn) for turn in chat],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is data, and fails in any way it likes
        raise RecipeError(
            f"`target.chat_template` can't render {str(chat[-1]['content'])[:60]!r}: {error}"
        ) from error
    return text


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"`target.device`: {name!r} can't be used: {error}") from error
