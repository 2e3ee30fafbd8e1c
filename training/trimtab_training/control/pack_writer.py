"""Writes a trained control as a pack: the model, its tokenizer, the manifest, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_processors.pack import Pack
from trimtab_training.control.data import DataFacts
from trimtab_training.control.recipe import ControlRecipe, TrainRecipe

RECIPE_FILE = "training_recipe.yaml"
_LAST_STEPS = 20
_PACKAGES = ("trimtab", "torch", "transformers", "accelerate")


def write_pack(
    recipe: ControlRecipe,
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
    save_model(directory, model, weights, tokenizer)
    manifest = Pack(
        name=recipe.name, strength=pack_strength(recipe), description=recipe.description, training=training
    )
    manifest.save(directory)
    (directory / "README.md").write_text(model_card(recipe, training), encoding="utf-8")


def save_model(
    directory: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a model of a pack with its tokenizer."""
    model.save_pretrained(directory, state_dict=dict(weights))
    tokenizer.save_pretrained(directory)


def pack_strength(recipe: ControlRecipe) -> float:
    """The strength of requests that name none: 1 if it was trained at, else the nearest one that was."""
    lowest, highest = recipe.strengths
    return min(max(1.0, lowest), highest)


def outcome(
    facts: Sequence[DataFacts], log: Sequence[Mapping[str, Any]], steps: int, seconds: float
) -> dict[str, Any]:
    """The manifest's entry on the training of one model.

    Args:
        facts: its data.
        log: the lines of its log.
        steps: the number of its steps.
        seconds: how long it took.
    """
    last = log[-_LAST_STEPS:]
    return {
        "data": [asdict(each) for each in facts],
        "steps": steps,
        "loss": {each.name: _mean([line["losses"][each.name] for line in last]) for each in facts},
        "seconds": round(seconds, 1),
    }


def provenance(recipe: TrainRecipe, command: str) -> dict[str, Any]:
    """The command, the recipe and the versions of the packages."""
    return {
        "command": command,
        "versions": {package: version(package) for package in _PACKAGES},
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
    }


def training_facts(
    recipe: ControlRecipe, made: Mapping[str, Any], *, command: str, parameters: int
) -> dict[str, Any]:
    """The manifest's entry on the training of a control.

    Args:
        recipe: its keys.
        made: its outcome.
        command: what was typed.
        parameters: the control's.
    """
    return {
        "method": "cross-model control (arXiv 2410.17599)",
        "template": recipe.template.model_dump(mode="json", exclude_none=True),
        "parameters": parameters,
        **made,
        **provenance(recipe, command),
    }


def model_card(recipe: ControlRecipe, training: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the front matter of the hub."""
    template = training["template"]["model_name_or_path"]
    return f"""{front_matter("cross-model-control")}
# {recipe.name}

{recipe.description or "A control."}

A control for Trimtab: its logits are added to those of a larger model, its template or another one.

- Template: `{template}`
- Parameters: {training["parameters"]:,}
- Strength: trained at {_range(recipe)}; {pack_strength(recipe):g} if a request names none
- Steps: {training["steps"]}, in {training["seconds"]:.0f} s

{data_table(training)}

{hashes([training])}

## Use

```sh
trimtab serve --model {template} --control {recipe.name}=DIRECTORY
```

{training_section(training)}"""


def front_matter(method: str) -> str:
    """The YAML header of a model card, which hubs read."""
    head = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["trimtab", method], "pipeline_tag": "text-generation"}
    )
    return f"---\n{head}---\n"


def data_table(made: Mapping[str, Any]) -> str:
    """The data sets of an outcome, with their losses."""
    rows = "\n".join(
        f"| {each['name']} | {each['objective']} | {each['weight']:g} | {each['records']} |"
        f" {each['answer_tokens']} | {_loss(made['loss'][each['name']])} |"
        for each in made["data"]
    )
    loss = f"loss of the last {_LAST_STEPS} steps, in nats"
    head = f"| data set | objective | weight | records | answer tokens | {loss} |\n|---|---|---|---|---|---|"
    return f"{head}\n{rows}"


def hashes(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The sha256 of each file that the outcomes come from."""
    found = {path: sha for made in outcomes for each in made["data"] for path, sha in each["sha256"].items()}
    lines = "\n".join(f"{sha}  {path}" for path, sha in found.items())
    return f"The files' sha256:\n\n```\n{lines}\n```"


def training_section(training: Mapping[str, Any]) -> str:
    return f"""## Training

```sh
{training["command"]}
```

with `{RECIPE_FILE}`, and these versions: `{json.dumps(training["versions"])}`.
"""


def _mean(losses: Sequence[float]) -> float | None:
    """The mean; None if the log of the steps is missing."""
    return round(sum(losses) / len(losses), 6) if losses else None


def _loss(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4g}"


def _range(recipe: ControlRecipe) -> str:
    lowest, highest = recipe.strengths
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
