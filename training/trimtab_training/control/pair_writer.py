"""Writes the manifest and the model card of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab_processors.pack import Component, Pack
from trimtab_training.control.pack_writer import (
    data_table,
    front_matter,
    hashes,
    provenance,
    training_section,
)
from trimtab_training.control.pair_recipe import PairRecipe

_COMPONENTS = (Component(model="./plus", weight=1.0), Component(model="./minus", weight=-1.0))


def write_manifest(recipe: PairRecipe, training: dict[str, Any]) -> None:
    """Write manifest and card into `output_dir`, where the models are in `plus` and `minus`.

    Args:
        recipe: its name, description and strength.
        training: what the manifest and the card say of the training.
    """
    manifest = Pack(
        name=recipe.name,
        strength=recipe.strength,
        description=recipe.description,
        training=training,
        components=_COMPONENTS,
    )
    manifest.save(recipe.output_dir)
    (recipe.output_dir / "README.md").write_text(pair_card(recipe, training), encoding="utf-8")


def pair_facts(recipe: PairRecipe, made: Mapping[str, Mapping[str, Any]], command: str) -> dict[str, Any]:
    """The manifest's entry on the training of a pair.

    Args:
        recipe: its keys.
        made: the outcome of each model that was trained.
        command: what was typed.
    """
    return {
        "method": "a pair of models that were trained alone (arXiv 2401.08565, arXiv 2605.31293)",
        "control": recipe.control.model_dump(mode="json", exclude_none=True),
        **made,
        **provenance(recipe, command),
    }


def pair_card(recipe: PairRecipe, training: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the front matter of the hub."""
    begun_as = recipe.control.model_name_or_path
    sections = "\n\n".join(
        _section(part, weight, training) for part, weight in (("plus", "+1"), ("minus", "-1"))
    )
    return f"""{front_matter("proxy-tuning")}
# {recipe.name}

{recipe.description or "A pair of models."}

A control for Trimtab: the logits of `plus` minus those of `minus` are added to the logits of a larger model.

- Both began as: {f"`{begun_as}`" if begun_as else "the same fresh model"}
- Parameters: {training["plus"]["parameters"]:,} each
- Strength: {recipe.strength:g} if a request names none

{sections}

{hashes([training[part] for part in recipe.members])}

## Use

```sh
trimtab serve --model MODEL --control {recipe.name}=DIRECTORY
```

{training_section(training)}"""


def _section(part: str, weight: str, training: Mapping[str, Any]) -> str:
    head = f"## `{part}`, weight {weight}\n\n"
    if part not in training:
        return head + "The model before the training."
    made = training[part]
    return f"{head}{made['steps']} steps, in {made['seconds']:.0f} s.\n\n{data_table(made)}"
