"""The recipe of `trimtab similarity`: the models, the texts, and how shifts are compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from trimtab_processors.settings import DEFAULT_TABLES
from trimtab_training.evaluation.recipe import NAME, BootstrapSettings, Questions
from trimtab_training.recipe_file import Section

_Location = Annotated[str, Field(min_length=1)]


class ComparedModel(Section):
    """A model before and after fine-tuning. The difference of their logits is its shift."""

    name: Annotated[str, Field(pattern=NAME)]
    base: _Location
    """A directory or a hub id."""
    tuned: _Location
    """A directory or a hub id. It has the vocabulary of `base`."""
    task: Annotated[str, Field(pattern=NAME)]
    """What it was tuned on. Models of the same task are compared; the others are a null."""
    chat_template: str | None = None
    """A Jinja template, or a file that holds one; None: the tokenizer's own."""


class SimilarityRecipe(Section):
    """What `trimtab similarity` does."""

    models: tuple[ComparedModel, ...]
    texts: Path | None = None
    """A file: JSON Lines with `text`, or plain text."""
    questions: Questions | None = None
    """Questions with answers. The positions are those of the answers."""
    system_prompt: str | None = None
    top_k: Annotated[int, Field(ge=3)] = 50
    """Number of tokens that are compared at each position."""
    top_k_of: Literal["base", "tuned"] = "base"
    """The model whose likeliest tokens are compared."""
    max_positions: Annotated[int, Field(ge=2)] = 500
    """Upper bound on the number of positions. A random sample is drawn if there are more."""
    max_characters: Annotated[int, Field(ge=1)] = 1000
    """Texts are cut into pieces of this length."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of the sample of positions and of the shuffled null."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    """A device of torch; auto: the first GPU, or the CPU if there is none."""
    bootstrap: BootstrapSettings = BootstrapSettings()
    tables: Path = DEFAULT_TABLES
    """Where mapping tables are kept."""
    output_dir: Path
    overwrite_output_dir: bool = False

    @field_validator("models")
    @classmethod
    def _can_be_compared(cls, models: tuple[ComparedModel, ...]) -> tuple[ComparedModel, ...]:
        names = Counter(model.name for model in models)
        if double := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"{double!r} is listed twice. Give each model a name of its own")
        if len(models) < 2:
            raise ValueError(f"a comparison needs at least two models, got {len(models)}. Add another")
        tasks = Counter(model.task for model in models)
        if max(tasks.values()) < 2:
            raise ValueError(f"no two models have the same `task`, got {', '.join(tasks)}. Add one of a task")
        return models

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.texts is None) == (not self.questions):
            found = "neither" if self.texts is None else "both"
            raise ValueError(f"a recipe needs one of `texts` and `questions`, got {found}")
        return self
