"""`trimtab eval`: what a control does to a model, as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[RECIPE.yaml] [--KEY VALUE]...",
)
def evaluate(context: typer.Context) -> None:
    """Ask a model questions without and with a control, score its answers, and write tables and a plot.

    Every key of the recipe is also an option, whose value is YAML: `--max_new_tokens 16`,
    `--strengths '[0, 1]'`, `--target.device cpu`. docs/evaluation.md has the keys.
    """
    from transformers.utils import logging

    from trimtab_training.evaluation import evaluate
    from trimtab_training.evaluation.recipe import EvalRecipe
    from trimtab_training.evaluation.report import print_table
    from trimtab_training.recipe_file import RecipeError, read_recipe

    logging.disable_progress_bar()
    arguments = list(context.args)
    path = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    try:
        recipe = read_recipe(EvalRecipe, path, arguments)
        with _progress() as progress:
            result = evaluate.evaluate(recipe, progress)
    except RecipeError as error:
        typer.echo(f"trimtab eval: {error}", err=True)
        raise typer.Exit(2) from error
    console = Console()
    for table in result.tables:
        print_table(table, console if console.is_terminal else Console(width=240))
    each = (
        f", {result.seconds / len(result.answers):.2f} s each" if result.answers and not result.tofu else ""
    )
    print(f"{len(result.answers)} answers{each}, {result.seconds:.0f} s. Results: {recipe.output_dir}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("answers", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
