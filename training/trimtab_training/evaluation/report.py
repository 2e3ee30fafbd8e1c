"""Results for people and programs: a table as text and as Markdown, a plot over strength, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab_training.evaluation.bootstrap import Estimate
from trimtab_training.evaluation.chart import Panel, Point, panels_chart
from trimtab_training.evaluation.results import Answer, Cell
from trimtab_training.recipe_file import RecipeError

RESULTS, ANSWERS, TABLE, PLOT = "results.json", "answers.jsonl", "results.md", "results.svg"

TableData = tuple[list[str], list[list[str]]]
"""A header and rows."""


def prepare_directory(directory: Path, *, overwrite: bool) -> None:
    """Make the output directory.

    Raises:
        RecipeError: it has files and may not be overwritten, or it can't be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        occupied = any(directory.iterdir())
    except OSError as error:
        raise RecipeError(f"`output_dir`: {directory} can't be made: {error}") from error
    if occupied and not overwrite:
        raise RecipeError(
            f"`output_dir`: {directory} is not empty. Choose another, or set `overwrite_output_dir: true`"
        )


def write(
    directory: Path,
    cells: Sequence[Cell],
    answers: Iterable[Answer],
    about: Mapping[str, Any],
    tables: Iterable[TableData],
) -> None:
    """Write all files of a result.

    Args:
        directory: where they go.
        cells: the means of groups of questions; without any, there are no answers and no plot.
        answers: what they are means of.
        about: the recipe, and what else belongs to the result.
        tables: what `results.md` has.
    """
    data = {**about, "cells": [cell.plain() for cell in cells]}
    (directory / RESULTS).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / TABLE).write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    if cells:
        lines = (json.dumps(answer.plain(), ensure_ascii=False) for answer in answers)
        (directory / ANSWERS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (directory / PLOT).write_text(plot(cells), encoding="utf-8")


def markdown(data: TableData) -> str:
    """A table of Markdown."""
    header, rows = data
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def print_table(data: TableData, console: Console) -> None:
    """A table for a terminal."""
    header, rows = data
    table = Table()
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot(cells: Sequence[Cell]) -> str:
    """A panel for each group, a line for each score and routing, over strength. SVG."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for (group, score, routing), line in _lines(cells).items():
        name = f"{score}, {routing}" if routing else score
        points = [Point(strength, *cell.value) for strength, cell in sorted(line.items())]
        panels.setdefault(group, {})[name] = points
    drawn = [Panel(group, lines) for group, lines in panels.items()]
    return panels_chart(drawn, x_label="strength of the control")


def number(value: float) -> str:
    """A share with two decimals: `.93`, `1.00`."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"


def cells_table(cells: Sequence[Cell]) -> TableData:
    """A row for each group, score and routing, a column for each strength."""
    lines = _lines(cells)
    strengths = sorted({cell.setting.strength for cell in cells})
    counts = {cell.group: cell.questions for cell in cells}
    rows = [
        [group, score, str(counts[group]), routing or "-", *(_shown(line.get(each)) for each in strengths)]
        for (group, score, routing), line in lines.items()
    ]
    return ["group", "score", "n", "routing", *(f"strength {strength:g}" for strength in strengths)], rows


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else interval(cell.value)


def interval(value: Estimate) -> str:
    """A mean and its interval: `.93 [.80, .97]`."""
    return f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"


def _lines(cells: Sequence[Cell]) -> dict[tuple[str, str, str | None], dict[float, Cell]]:
    """Cells by group, score and routing, then by strength. Strength 0 is on the lines of all routings."""
    routings: list[str | None] = [
        *dict.fromkeys(each.setting.routing for each in cells if each.setting.routing)
    ]
    lines: dict[tuple[str, str, str | None], dict[float, Cell]] = {}
    for cell in cells:
        for routing in routings or [None]:
            if cell.setting.routing in (None, routing):
                line = lines.setdefault((cell.group, cell.score, routing), {})
                line[cell.setting.strength] = cell
    return lines
