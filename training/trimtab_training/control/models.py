"""Template and control of a recipe, loaded or made, and held to one vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab_mappings import VocabularyError, load_tokenizer
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.recipe import Architecture, ControlModel, TemplateModel


def read_tokenizer(
    path_or_id: str, revision: str | None, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and give it the chat template of a recipe: Jinja, or a file with it.

    Raises:
        TrainingError: it can't be loaded.
    """
    try:
        tokenizer = load_tokenizer(path_or_id, revision)
    except VocabularyError as error:
        raise TrainingError(str(error)) from error
    if chat_template is not None:
        written = "{" in chat_template
        tokenizer.chat_template = chat_template if written else _template_file(chat_template)
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"The tokenizer of {path_or_id} has no eos token, with which an answer would end")
    return tokenizer


def _template_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"`chat_template` must be Jinja or a file with it, got {path!r}: {error}"
        ) from error


def load_template(section: TemplateModel) -> PreTrainedModel:
    """Load the template, frozen.

    Raises:
        TrainingError: it can't be loaded.
    """
    return _load(section.model_name_or_path, section.revision, section.dtype).requires_grad_(
        requires_grad=False
    )


def make_control(
    section: ControlModel, tokenizer: PreTrainedTokenizerBase, logits: int, seed: int
) -> PreTrainedModel:
    """Load the control's checkpoint, or make a fresh model of `logits` logits, in float32.

    The random state is seeded first, so that fresh weights and dropout repeat.

    Raises:
        TrainingError: it can't be loaded.
    """
    torch.manual_seed(seed)
    if section.model_name_or_path is not None:
        return _load(section.model_name_or_path, section.revision, "float32")
    assert section.config is not None  # noqa: S101 - the recipe has one of both
    return _fresh(section.config, tokenizer, logits)


def _fresh(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, logits: int) -> PreTrainedModel:
    sizes = architecture.model_dump(exclude_none=True)
    sizes.setdefault("intermediate_size", 3 * architecture.hidden_size)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token(tokenizer),
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=logits, **sizes, **special))
    model.generation_config = GenerationConfig(**special)
    if not architecture.tie_word_embeddings:
        nn.init.zeros_(model.get_output_embeddings().weight)  # untrained, it shifts nothing
    return model


def _load(path_or_id: str, revision: str | None, dtype: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path_or_id, revision=revision, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"No model can be loaded from {path_or_id!r}: {error}") from error
    return model


def require_same_vocabulary(
    template: str,
    template_tokenizer: PreTrainedTokenizerBase,
    control: str,
    control_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Check that two tokenizers have the same tokens under the same ids.

    Raises:
        TrainingError: they have not.
    """
    ours, theirs = template_tokenizer.get_vocab(), control_tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = len(ours.items() ^ theirs.items())
    raise TrainingError(
        f"Template {template} ({len(ours)} tokens) and control {control} ({len(theirs)} tokens)"
        f" have different vocabularies: {differing} entries are in one of them only."
        " Take a control of the template's vocabulary, or a fresh one (`control: {config: ...}`)"
    )


def shared_logits(
    template: PreTrainedModel, control: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The number of logits that both models have; either may have more of them than there are tokens.

    Raises:
        TrainingError: a model has fewer than there are tokens.
    """
    widths = [logits_of(template), logits_of(control)]
    needed = token_count(tokenizer)
    if min(widths) < needed:
        raise TrainingError(
            f"The tokenizer has {needed} tokens, but the template has {widths[0]} logits and the control"
            f" {widths[1]}"
        )
    return min(widths)


def require_enough_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model without a template has a logit for each token.

    Raises:
        TrainingError: it has fewer.
    """
    logits, needed = logits_of(model), token_count(tokenizer)
    if logits < needed:
        raise TrainingError(
            f"`control` has {logits} logits, but its tokenizer has {needed} tokens."
            " Set `control.tokenizer_name` to the tokenizer of the model"
        )


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of logits that a tokenizer's ids need."""
    return int(max(tokenizer.get_vocab().values())) + 1


def logits_of(model: PreTrainedModel) -> int:
    """The number of logits of a model."""
    rows: int = model.get_output_embeddings().weight.shape[0]
    return rows


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; nothing reads it."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)
