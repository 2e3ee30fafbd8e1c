"""`trimtab similarity`: the shifts of fine-tuned models compared, as a recipe says."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[RECIPE.yaml] [--KEY VALUE]...",
)
def similarity(context: typer.Context) -> None:
    """Compare what fine-tuning changes in the logits of different models, and draw a heat map.

    Every key of the recipe is also an option, whose value is YAML: `--top_k 20`, `--models.0.task names`.
    docs/similarity.md has the keys.
    """
    from transformers.utils import logging

    from trimtab_training.evaluation.report import print_table
    from trimtab_training.recipe_file import RecipeError, read_recipe
    from trimtab_training.similarity.recipe import SimilarityRecipe
    from trimtab_training.similarity.run import run

    logging.disable_progress_bar()
    arguments = list(context.args)
    path = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    try:
        recipe = read_recipe(SimilarityRecipe, path, arguments)
        result = run(recipe, lambda line: typer.echo(line, err=True))
    except RecipeError as error:
        typer.echo(f"trimtab similarity: {error}", err=True)
        raise typer.Exit(2) from error
    console = Console()
    print_table(result.table, console if console.is_terminal else Console(width=240))
    unused = f", {result.texts_without} texts without one" if result.texts_without else ""
    print(f"{result.positions} positions in {result.texts} texts{unused}. Results: {recipe.output_dir}")
