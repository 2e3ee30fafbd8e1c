"""`trimtab recipes`: lists and copies the recipes that come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The recipes that come with Trimtab.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.parent.name for path in RECIPES.glob("*/recipe.yaml"))


@app.command("list")
def list_() -> None:
    """Print the name of each recipe and what it does."""
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        text = (RECIPES / name / "recipe.yaml").read_text(encoding="utf-8")
        typer.echo(f"{name:{width}}  {text.splitlines()[0].removeprefix('# ')}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="One that `trimtab recipes list` prints.")],
    directory: Annotated[Path, typer.Argument(help="A new directory for the recipe and its data.")],
) -> None:
    """Copy a recipe and its data into DIRECTORY, to be changed and run there."""
    if name not in recipe_names():
        typer.echo(f"trimtab recipes: no recipe {name!r}. Available: {', '.join(recipe_names())}", err=True)
        raise typer.Exit(2)
    if directory.exists():
        typer.echo(f"trimtab recipes: {directory} exists. Name a new directory", err=True)
        raise typer.Exit(2)
    shutil.copytree(RECIPES / name, directory)
    typer.echo(f"cd {directory} && trimtab train recipe.yaml")
