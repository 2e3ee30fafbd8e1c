"""`trimtab train`: a control from a recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[RECIPE.yaml] [--KEY VALUE]...",
)
def train(context: typer.Context) -> None:
    """Train a control beside a frozen model, or a pair of models, as RECIPE.yaml says, and write a pack.

    Every key of the recipe is also an option, whose value is YAML: `--learning_rate 1e-4`,
    `--template.model_name_or_path ./model`, `--datasets.0.weight 2`. docs/training.md has the keys.
    """
    from accelerate import PartialState
    from transformers.utils import logging

    from trimtab_training.control.errors import TrainingError
    from trimtab_training.control.formats import DataError
    from trimtab_training.control.pair import train_pair
    from trimtab_training.control.pair_recipe import PairRecipe, read_train_recipe
    from trimtab_training.control.run import train as train_control
    from trimtab_training.control.training_run import InterruptedRunError
    from trimtab_training.recipe_file import RecipeError

    logging.disable_progress_bar()
    arguments = list(context.args)
    command = shlex.join(["trimtab", "train", *arguments])
    path = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    try:
        recipe, console = read_train_recipe(path, arguments), Console(stderr=True)
        if isinstance(recipe, PairRecipe):
            losses = train_pair(recipe, command, console)
        else:
            losses = {"": train_control(recipe, command, console)}
    except (RecipeError, DataError, TrainingError) as error:
        typer.echo(f"trimtab train: {error}", err=True)
        raise typer.Exit(2) from error
    except InterruptedRunError as error:
        typer.echo(f"trimtab train: {error}", err=True)
        raise typer.Exit(128 + error.signal_number) from error
    if PartialState().is_main_process:
        print(f"{_last_losses(losses)} The pack is in {recipe.output_dir}")


def _last_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """The last step's loss of each model, in words."""
    last = [f"{name} {steps[-1]:.4f}".lstrip() for name, steps in losses.items() if steps]
    return f"Loss of the last step: {', '.join(last)}." if last else "No step is logged."
