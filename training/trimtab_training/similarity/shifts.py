"""Shifts of models: logits after fine-tuning minus logits before, at given positions of given texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from trimtab_mappings import Vocabulary, VocabularyError, load_encoder, load_vocabulary
from trimtab_training.evaluation.recipe import TargetSettings
from trimtab_training.evaluation.target import LoadedTarget, load_target, read_template, render_text
from trimtab_training.recipe_file import RecipeError
from trimtab_training.similarity.positions import Passage, Position, Reading, token_ends
from trimtab_training.similarity.recipe import ComparedModel, SimilarityRecipe


@dataclass(frozen=True)
class Shifts:
    """A model's shifts, and the tokens at which they are compared."""

    values: Tensor
    """float32 [positions, tokens]"""
    likeliest: Tensor
    """int64 [positions, top_k]"""


class Reader:
    """A model's tokenizer, which base and tuned share."""

    def __init__(self, model: ComparedModel) -> None:
        """Load the tokenizer.

        Raises:
            RecipeError: it can't be loaded, or base and tuned have different vocabularies.
        """
        self.model = model
        try:
            self.encoder = load_encoder(model.tuned)
            base = load_vocabulary(model.base)
        except VocabularyError as error:
            raise RecipeError(f"`models`: {model.name!r}: {error}") from error
        self.vocabulary = self.encoder.vocabulary
        if _text_tokens(base) != _text_tokens(self.vocabulary):
            raise RecipeError(
                f"`models`: {model.name!r}: base {model.base!r} ({len(base)} tokens) and tuned"
                f" {model.tuned!r} ({len(self.vocabulary)} tokens) have different vocabularies. Name the base"
                " model that was tuned"
            )
        with _naming(model):
            self._template = read_template(model.chat_template)

    def read(self, passage: Passage, system_prompt: str | None = None) -> Reading:
        """Encode a passage behind its prompt, as one text.

        Raises:
            RecipeError: there is no chat template for the question, or it fails.
        """
        ids = self._encode(passage, system_prompt)
        return Reading(ids, token_ends(ids, self.vocabulary, passage.text.encode()))

    def _encode(self, passage: Passage, system_prompt: str | None) -> list[int]:
        tokenizer = self.encoder.tokenizer
        if passage.prompt is None:
            return list(tokenizer(passage.text).input_ids)
        chat = passage.prompt.chat(system_prompt)
        if chat is None:
            return list(tokenizer(f"{passage.prompt.prompt}{passage.text}").input_ids)
        with _naming(self.model):
            text = render_text(tokenizer, chat, self._template)
        return list(tokenizer(f"{text}{passage.text}", add_special_tokens=False).input_ids)


def measure_shifts(
    reader: Reader,
    readings: Sequence[Reading],
    positions: Sequence[Position],
    recipe: SimilarityRecipe,
    report: Callable[[str], None],
) -> Shifts:
    """Compute a model's shifts at `positions`. One of its two models is in memory at a time.

    Args:
        reader: the model.
        readings: [passages].
        positions: sorted by passage.
        recipe: says which tokens are compared, and where the models run.
        report: is told what is being done.

    Raises:
        RecipeError: a model can't be loaded, or a passage exceeds its context.
    """
    logits = {}
    for stage, name in (("base", reader.model.base), ("tuned", reader.model.tuned)):
        report(f"{reader.model.name}: {stage} model {name}")
        settings = TargetSettings(model_name_or_path=name, dtype=recipe.dtype, device=recipe.device)
        with _naming(reader.model, stage):
            logits[stage] = _logits(load_target(settings), readings, positions)
    # Columns behind the tokenizer's last token are padding, which training does not reach.
    width = min(len(reader.vocabulary), *(each.shape[1] for each in logits.values()))
    chosen = logits[recipe.top_k_of][:, :width]
    if recipe.top_k > width:
        raise RecipeError(
            f"`top_k` must be at most {width}, the tokens of {reader.model.name!r}, got {recipe.top_k}"
        )
    likeliest = chosen.topk(recipe.top_k, dim=1).indices
    return Shifts(logits["tuned"][:, :width] - logits["base"][:, :width], likeliest)


@torch.no_grad()
def _logits(target: LoadedTarget, readings: Sequence[Reading], positions: Sequence[Position]) -> Tensor:
    """The logits at all positions, on the CPU: float32 [positions, width]."""
    rows = []
    for passage, group in groupby(positions, key=lambda position: position.passage):
        ids, ends = readings[passage]
        _require_context(target, len(ids))
        places = [ends[position.offset] - 1 for position in group]
        output = target.model(
            input_ids=torch.tensor([ids], device=target.device),
            use_cache=False,
            logits_to_keep=torch.tensor(places, device=target.device),
        )
        rows.append(output.logits[0].float().cpu())
    return torch.cat(rows)


def _require_context(target: LoadedTarget, tokens: int) -> None:
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise RecipeError(
            f"a text has {tokens} tokens, but the context of {target.name!r} is {context}. Set a lower"
            " `max_characters`, or leave long questions out"
        )


def _text_tokens(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Without special tokens: fine-tuning may add some."""
    return {token: spelled for token, spelled in enumerate(vocabulary.tokens) if spelled}


@contextmanager
def _naming(model: ComparedModel, stage: str = "tuned") -> Iterator[None]:
    """Let errors of the evaluation's functions name this recipe's keys."""
    try:
        yield
    except RecipeError as error:
        text = str(error).replace("target.model_name_or_path", stage).replace("target.", "")
        raise RecipeError(f"`models`: {model.name!r}: {text}") from error
