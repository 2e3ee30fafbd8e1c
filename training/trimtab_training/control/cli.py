"""`trimtab train`: a control from a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[RECIPE.yaml] [--KEY VALUE]...",
)
def train(context: typer.Context) -> None:
    """Train a control beside a frozen model, as RECIPE.yaml says, and write it as a pack.

    Every key of the recipe is also an option, whose value is YAML: `--learning_rate 1e-4`,
    `--template.model_name_or_path ./model`, `--datasets.0.weight 2`. docs/training.md has the keys.
    """
    from transformers.utils import logging

    from trimtab_training.control import run
    from trimtab_training.control.formats import DataError
    from trimtab_training.control.recipe import TrainRecipe
    from trimtab_training.control.trainer import TrainingError
    from trimtab_training.recipe_file import RecipeError, read_recipe

    logging.disable_progress_bar()
    arguments = list(context.args)
    command = shlex.join(["trimtab", "train", *arguments])
    path = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    try:
        recipe = read_recipe(TrainRecipe, path, arguments)
        losses = run.train(recipe, command, Console(stderr=True))
    except (RecipeError, DataError, TrainingError) as error:
        typer.echo(f"trimtab train: {error}", err=True)
        raise typer.Exit(2) from error
    except run.InterruptedRunError as error:
        typer.echo(f"trimtab train: {error}", err=True)
        raise typer.Exit(128 + error.signal_number) from error
    print(f"Loss of the last step: {losses[-1]:.4f}. The pack is in {recipe.output_dir}")
