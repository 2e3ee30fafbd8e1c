"""The figures of an evaluation as tables, and their medians over worlds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from trimtab_training.world.evaluate import Figure, Figures
from trimtab_training.world.world import TITLES

ByModel = Mapping[str, Mapping[float, Figures]]
"""model -> strength -> figures"""


def medians(worlds: Sequence[ByModel]) -> dict[str, dict[float, Figures]]:
    """The median over `worlds` of every figure of every model at every strength."""
    first = worlds[0]
    return {
        model: {
            strength: {
                figure: median(world[model][strength][figure] for world in worlds)
                for figure in first[model][strength]
            }
            for strength in first[model]
        }
        for model in first
    }


def markdown(results: ByModel) -> str:
    """A table with a line for each figure; a cell holds the figure at each strength."""
    strengths = " / ".join(f"{strength:g}" for strength in next(iter(results.values())))
    head = [f"strength {strengths}", *(TITLES[model] for model in results)]
    lines = [head, ["---"] * len(head), *_rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(results: ByModel, title: str) -> Table:
    """A section for each model, a row for each figure, a column for each strength."""
    table = Table(title=title, title_justify="left")
    table.add_column("share of answers, at strength")
    for strength in next(iter(results.values())):
        table.add_column(f"{strength:g}", justify="right")
    for model, by_strength in results.items():
        table.add_row(TITLES[model], style="bold")
        for figure in Figure:
            table.add_row(
                f"  {figure.value}", *(f"{figures[figure]:.2f}" for figures in by_strength.values())
            )
        table.add_section()
    return table


def plain(results: ByModel) -> dict[str, Any]:
    """The same as JSON knows it."""
    return {
        model: {
            f"{strength:g}": {figure.value: round(share, 3) for figure, share in figures.items()}
            for strength, figures in by_strength.items()
        }
        for model, by_strength in results.items()
    }


def _rows(results: ByModel) -> Iterable[list[str]]:
    for figure in Figure:
        cells = (
            " / ".join(f"{figures[figure]:.2f}" for figures in by_strength.values())
            for by_strength in results.values()
        )
        yield [figure.value, *cells]
