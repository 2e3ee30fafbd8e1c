"""The commands of `trimtab map`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trimtab_mappings.encoder import load_encoder
from trimtab_mappings.table import build_table
from trimtab_mappings.vocabulary import VocabularyError, load_vocabulary

app = typer.Typer(no_args_is_help=True, help="Mapping tables between vocabularies.")


@app.callback()
def _group() -> None:
    """Keep `build` a command of its own: Typer would take the only one for the whole program."""


@app.command()
def build(
    target: Annotated[str, typer.Option(help="The served model: a directory or a hub id.")],
    control: Annotated[str, typer.Option(help="The control model: a directory or a hub id.")],
    output: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)],
) -> None:
    """Build the table that carries a control's shift into a target's vocabulary."""
    try:
        served, encoder = load_vocabulary(target), load_encoder(control)
        start = time.perf_counter()
        table = build_table(served, encoder)
        seconds = time.perf_counter() - start
        table.save(output)
    except (VocabularyError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    rows = len(table.mapping)
    typer.echo(f"{output}: {rows} rows in {seconds:.2f} s")
    for kind, count in table.coverage._asdict().items():
        typer.echo(f"  {kind:<11} {count:>8} {count / max(rows, 1):7.1%}")
