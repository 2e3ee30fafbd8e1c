"""The commands of `trimtab map`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_mappings.building import build_table
from trimtab_mappings.decoding import VocabularyError
from trimtab_mappings.encoder import ByteEncoder
from trimtab_mappings.inspection import compare, count_tokens, look_up, summarize
from trimtab_mappings.loading import load_encoder, load_vocabulary
from trimtab_mappings.report import Report, print_report, to_json, write_html
from trimtab_mappings.scoring import find_meetings, score
from trimtab_mappings.strategies import DEFAULT, STRATEGIES
from trimtab_mappings.table import MappingTable, TableError
from trimtab_mappings.table_file import check_replaceable
from trimtab_mappings.texts import TextError, read_texts
from trimtab_mappings.views import (
    coverage_section,
    difference_report,
    lookup_report,
    score_report,
    summary_report,
    table_facts,
)
from trimtab_mappings.vocabulary import Vocabulary, role_warning

app = typer.Typer(no_args_is_help=True, help="Mapping tables between vocabularies.")

Table = Annotated[Path, typer.Argument(metavar="TABLE", help="A table, as `build` writes it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write a page to this file.", dir_okay=False)]
Text = Annotated[
    list[Path], typer.Option("--text", help="A text file; of a .jsonl, each line's `text`. May be repeated.")
]
_MODEL = "a directory or a hub id"
Target = Annotated[
    str | None, typer.Option("--target", help=f"Where the target's tokenizer is now: {_MODEL}.")
]
Control = Annotated[
    str | None, typer.Option("--control", help=f"Where the control's tokenizer is now: {_MODEL}.")
]


@app.command()
def build(
    *,
    target: Annotated[str, typer.Option(help=f"The served model: {_MODEL}.")],
    control: Annotated[str, typer.Option(help=f"The control model: {_MODEL}.")],
    output: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)],
    strategy: Annotated[str, typer.Option(help=f"One of: {', '.join(STRATEGIES)}.")] = DEFAULT,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Build the table that carries a control's shift into a target's vocabulary."""
    with _refusals():
        check_replaceable(output)
        served, encoder = load_encoder(target), load_encoder(control)
        start = time.perf_counter()
        table = build_table(served, encoder, strategy)
        seconds = time.perf_counter() - start
        table.save(output)
        title = f"{output}: {len(table.mapping)} rows in {seconds:.2f} s"
        warnings = _warnings(served.vocabulary, encoder.vocabulary)
        report = Report(title, table_facts(table), [coverage_section(table.coverage)], warnings)
        result = {
            "output": str(output),
            "seconds": seconds,
            "coverage": table.coverage,
            "warnings": warnings,
        }
        _emit(result, report, as_json=as_json, html=html)


@app.command()
def show(
    table: Table,
    *,
    text: Text = [],  # noqa: B006 - Typer's way to an option that may be repeated
    target: Target = None,
    control: Control = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst rows to show.")] = 20,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Show how much of a table is exact, how far its other rows are off, and which are the worst.

    The tokenizers are read for --text only.
    """
    with _refusals():
        loaded = MappingTable.load(table)
        texts = read_texts(text)
        uses = count_tokens(loaded, *_encoders(loaded, target, control), texts) if texts else None
        summary = summarize(loaded, uses, worst=worst)
        _emit(summary, summary_report(summary), as_json=as_json, html=html)


@app.command()
def lookup(
    table: Table,
    token: Annotated[list[str], typer.Argument(help="A token's text, `#` and its id, or bytes as <E4 B8>.")],
    near: Annotated[int, typer.Option(min=0, help="How many neighbours to show.")] = 10,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Show what target tokens map to, what else is near, and how the control spells them."""
    with _refusals():
        loaded = MappingTable.load(table)
        lookups = [found for each in token for found in look_up(loaded, each, near=near)]
        _emit(lookups, lookup_report(loaded, lookups), as_json=as_json, html=html)


@app.command()
def diff(before: Table, after: Table, as_json: Json = False, html: Html = None) -> None:
    """Show in which rows and segments two tables of one target differ; the exit status is 1 where any do."""
    with _refusals():
        old, new = MappingTable.load(before), MappingTable.load(after)
        difference = compare(old, new)
        _emit(difference, difference_report(old, new, difference), as_json=as_json, html=html)
    raise typer.Exit(1 if difference.changes or difference.segments else 0)


@app.command()
def check(
    table: Table,
    target: Annotated[str, typer.Option(help=f"The served model: {_MODEL}.")],
    control: Annotated[str, typer.Option(help=f"The control model: {_MODEL}.")],
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Check that a table is whole, and for these two tokenizers."""
    with _refusals():
        loaded = MappingTable.load(table)
        served, own = load_vocabulary(target), load_vocabulary(control)
        loaded.check(served, own)
        warnings = _warnings(served, own)
        result = {
            "table": str(table),
            "target": target,
            "control": control,
            "strategy": loaded.strategy,
            "warnings": warnings,
        }
        report = Report(f"{table} is whole, and for these two", table_facts(loaded), warnings=warnings)
        _emit(result, report, as_json=as_json, html=html)


@app.command(name="score")
def score_(
    table: Table,
    *,
    text: Text,
    target: Target = None,
    control: Control = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Measure on text how often a table, and each strategy beside it, names the control's own next token."""
    with _refusals():
        loaded = MappingTable.load(table)
        served, encoder = _encoders(loaded, target, control)
        loaded.check(served.vocabulary, encoder.vocabulary)
        meetings = find_meetings(served, encoder, read_texts(text))
        others = [name for name in STRATEGIES if name != loaded.strategy]
        tables = [loaded, *(build_table(served, encoder, name) for name in others)]
        scores = [score(each, meetings) for each in tables]
        result = {
            "target_tokens": meetings.target_tokens,
            "control_tokens": meetings.control_tokens,
            "skipped_bytes": meetings.skipped_bytes,
            "scores": scores,
        }
        _emit(result, score_report(loaded, meetings, scores), as_json=as_json, html=html)


def _encoders(
    table: MappingTable, target: str | None, control: str | None
) -> tuple[ByteEncoder, ByteEncoder]:
    """The two sides' encoders, from where the table was made from or where the user says they are now."""
    return load_encoder(target or table.target_name), load_encoder(control or table.control_name)


def _warnings(target: Vocabulary, control: Vocabulary) -> list[str]:
    return [*filter(None, (role_warning(target, "target"), role_warning(control, "control")))]


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what can be wrong with a user's input into a message and the exit status 2."""
    try:
        yield
    except (TableError, VocabularyError, TextError, OSError, ValueError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from error


def _emit(result: Any, report: Report, *, as_json: bool, html: Path | None) -> None:
    if as_json:
        typer.echo(to_json(result))
    if html:
        write_html(report, html)
        typer.echo(f"wrote {html}", err=True)
    if not as_json and not html:
        print_report(report)
