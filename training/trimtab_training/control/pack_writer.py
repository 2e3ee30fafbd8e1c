"""Writes a trained control as a pack: the model, its tokenizer, the manifest, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_processors.pack import Pack
from trimtab_training.control.data import DataFacts
from trimtab_training.control.recipe import TrainRecipe

RECIPE_FILE = "training_recipe.yaml"
_LAST_STEPS = 20
_PACKAGES = ("trimtab", "torch", "transformers", "accelerate")


def write_pack(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
) -> None:
    """Write the pack into the recipe's `output_dir`.

    Args:
        recipe: its name, description and keys.
        model: the control.
        weights: its weights, gathered from all processes.
        tokenizer: with the chat template that it was trained with.
        training: what the manifest and the card say of the training.
    """
    directory = recipe.output_dir
    model.save_pretrained(directory, state_dict=dict(weights))
    tokenizer.save_pretrained(directory)
    manifest = Pack(
        name=recipe.name, strength=pack_strength(recipe), description=recipe.description, training=training
    )
    manifest.save(directory)
    (directory / "README.md").write_text(model_card(recipe, training), encoding="utf-8")


def pack_strength(recipe: TrainRecipe) -> float:
    """The strength of requests that name none: 1 if it was trained at, else the nearest one that was."""
    lowest, highest = recipe.strengths
    return min(max(1.0, lowest), highest)


def training_facts(
    recipe: TrainRecipe,
    facts: Sequence[DataFacts],
    log: Sequence[Mapping[str, Any]],
    *,
    command: str,
    parameters: int,
    seconds: float,
) -> dict[str, Any]:
    """What is kept of a training.

    Args:
        recipe: its keys.
        facts: its data.
        log: the lines of its log.
        command: what was typed.
        parameters: the control's.
        seconds: how long the training took.
    """
    last = log[-_LAST_STEPS:]
    return {
        "method": "cross-model control (arXiv 2410.17599)",
        "template": recipe.template.model_dump(mode="json", exclude_none=True),
        "parameters": parameters,
        "data": [asdict(each) for each in facts],
        "steps": log[-1]["step"],
        "loss": {
            name: round(sum(line["losses"][name] for line in last) / len(last), 6)
            for name in log[-1]["losses"]
        },
        "seconds": round(seconds, 1),
        "command": command,
        "versions": {package: version(package) for package in _PACKAGES},
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
    }


def model_card(recipe: TrainRecipe, training: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the front matter of the hub."""
    head = yaml.safe_dump(
        {
            "library_name": "transformers",
            "tags": ["trimtab", "cross-model-control"],
            "pipeline_tag": "text-generation",
        }
    )
    template = training["template"]["model_name_or_path"]
    rows = "\n".join(
        f"| {each['name']} | {each['objective']} | {each['weight']:g} | {each['records']} |"
        f" {each['answer_tokens']} |"
        f" {training['loss'][each['name']]:.4g} |"
        for each in training["data"]
    )
    hashes = "\n".join(f"{sha}  {path}" for each in training["data"] for path, sha in each["sha256"].items())
    return f"""---
{head}---

# {recipe.name}

{recipe.description or "A control."}

A control for Trimtab: its logits are added to those of a larger model, its template or another one.

- Template: `{template}`
- Parameters: {training["parameters"]:,}
- Strength: trained at {_range(recipe)}; {pack_strength(recipe):g} if a request names none
- Steps: {training["steps"]}, in {training["seconds"]:.0f} s

| data set | objective | weight | records | answer tokens | loss of the last {_LAST_STEPS} steps, in nats |
|---|---|---|---|---|---|
{rows}

The files' sha256:

```
{hashes}
```

## Use

```sh
trimtab serve --model {template} --control {recipe.name}=DIRECTORY
```

## Training

```sh
{training["command"]}
```

with `{RECIPE_FILE}`, and these versions: `{json.dumps(training["versions"])}`.
"""


def _range(recipe: TrainRecipe) -> str:
    lowest, highest = recipe.strengths
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
