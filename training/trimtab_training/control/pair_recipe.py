"""The recipe of a pair, and the choice between both kinds of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab_training.control.recipe import ControlRecipe, DataSet, Factor, TrainRecipe
from trimtab_training.recipe_file import RecipeError, Section, parse_recipe, read_keys

_BESIDE_A_TEMPLATE = frozenset({"npo", "retain", "distill"})


class PairMember(Section):
    """The data of one model of a pair."""

    datasets: list[DataSet] = Field(min_length=1)

    @model_validator(mode="after")
    def _needs_no_template(self) -> Self:
        for data_set in self.datasets:
            if data_set.objective in _BESIDE_A_TEMPLATE:
                raise ValueError(
                    f"the objective `{data_set.objective}` needs a template, which a pair does not have."
                    " Use `cross_entropy` or `forget`, or `kind: control`"
                )
            if data_set.answers == "generate":
                raise ValueError(
                    "`answers: generate` needs a template, which a pair does not have."
                    " Give the answers, or use `kind: control`"
                )
        return self


class PairRecipe(TrainRecipe):
    """Two models that are trained alone, from the same weights; the pack's shift is their difference."""

    kind: Literal["pair"]
    plus: PairMember
    minus: PairMember | None = None
    """None: the model as it is before the training."""
    strength: Factor = 1.0
    """The strength of requests that name none; the training does not use it."""

    @model_validator(mode="after")
    def _has_a_tokenizer(self) -> Self:
        if not self.tokenizer_source:
            raise ValueError("`control.tokenizer_name` is missing: a fresh model of a pair needs it")
        return self

    @model_validator(mode="after")
    def _resumes_in_place(self) -> Self:
        if self.resume_from_checkpoint not in (True, False):
            raise ValueError(
                "`resume_from_checkpoint` of a pair must be true or false, got"
                f" {str(self.resume_from_checkpoint)!r}: both models continue in `output_dir`"
            )
        return self

    @property
    def members(self) -> dict[str, PairMember]:
        """The models that are trained, by their names, in that order."""
        return {"plus": self.plus} | ({"minus": self.minus} if self.minus else {})

    @property
    def tokenizer_source(self) -> str:
        """The directory or hub id of the tokenizer of both models."""
        return self.control.tokenizer_name or self.control.model_name_or_path or ""


_KINDS: dict[str, type[ControlRecipe | PairRecipe]] = {"control": ControlRecipe, "pair": PairRecipe}


def read_train_recipe(path: Path | None, arguments: Sequence[str] = ()) -> ControlRecipe | PairRecipe:
    """Read the recipe of a training, of the kind that its `kind` names.

    Args:
        path: as `read_recipe` takes it.
        arguments: the same.

    Raises:
        RecipeError: the file can't be read, or a key or value is wrong.
    """
    data = read_keys(path, arguments)
    kind = data.get("kind", "control")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RecipeError(f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}")
    for other, model in _KINDS.items():
        strange = [key for key in data if key in model.model_fields and key not in _KINDS[kind].model_fields]
        if strange:
            raise RecipeError(
                f"`{strange[0]}` is a key of `kind: {other}`, and this recipe is `kind: {kind}`"
            )
    return parse_recipe(_KINDS[kind], data)
