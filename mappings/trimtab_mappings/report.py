"""What a command found, for people: tables in a terminal, and a self-contained page; for programs: JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LONG = 24  # characters of a token that are shown
_PAGE = b"<!doctype html>"  # how the template begins
_BAR = 12  # characters of a whole bar in a terminal


class Share(float):
    """A number from 0 to 1, shown as a percentage and a bar."""


Cell = str | int | float | bytes | None


@dataclass(frozen=True)
class Section:
    """A table under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What one command has to say."""

    title: str
    facts: Mapping[str, Cell] = dataclasses.field(default_factory=dict)
    sections: Sequence[Section] = ()
    warnings: Sequence[str] = ()


def show_token(token: bytes) -> str:
    """A token as people can read it: its text in quotes, or its bytes as `<E4 B8>`; long ones cut."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return f"<{token.hex(' ').upper()}>"
    if len(text) <= _LONG:
        return json.dumps(text, ensure_ascii=False)
    return f"{json.dumps(text[:_LONG], ensure_ascii=False)}… {len(text)} characters"


def show(cell: Cell) -> str:
    """A cell as text."""
    match cell:
        case None:
            return "-"
        case bytes():
            return show_token(cell)
        case Share():
            return f"{cell:.1%}"
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
        case _:
            return str(cell)


def to_json(result: Any) -> str:
    """Any of this package's results as JSON; a token as its text, null where it is none, and its bytes."""
    return json.dumps(_plain(result), ensure_ascii=False, indent=2)


def print_report(report: Report) -> None:
    """Print to the terminal, or without colours to whatever stands in its place."""
    from rich.console import Console  # noqa: PLC0415 - only where it is used
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def in_cell(cell: Cell) -> Text:
        is_token = isinstance(cell, bytes)
        return Text(_with_bar(cell), no_wrap=is_token, overflow="ellipsis" if is_token else None)

    console = Console(highlight=False)
    console.print(Text(report.title, style="bold"), soft_wrap=True)
    for name, value in report.facts.items():
        console.print(Text(f"  {name}: {show(value)}"), soft_wrap=True)
    for warning in report.warnings:
        console.print(Text(f"\nwarning: {warning}", style="yellow"), soft_wrap=True)
    for section in report.sections:
        console.print(Text(f"\n{section.title}", style="bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for index, column in enumerate(section.columns):
            cells = [row[index] for row in section.rows]
            number = all(
                isinstance(cell, int | float | None) and not isinstance(cell, Share) for cell in cells
            )
            # Only tokens and texts give way where a terminal is narrow: half an id is none.
            word = not any(isinstance(cell, bytes) or " " in show(cell) for cell in cells)
            table.add_column(column, justify="right" if number else "left", no_wrap=word)
        for row in section.rows:
            table.add_row(*(in_cell(cell) for cell in row))
        console.print(table)
        if section.note:
            console.print(Text(section.note, style="dim"), soft_wrap=True)


def write_html(report: Report, path: Path) -> None:
    """Write one page that needs nothing else.

    Raises:
        OSError: the file can't be written, or a file with other contents is there.
    """
    from jinja2 import Environment, PackageLoader  # noqa: PLC0415 - only where it is used

    environment = Environment(
        loader=PackageLoader("trimtab_mappings", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"] = show
    environment.tests["share"] = lambda cell: isinstance(cell, Share)
    environment.tests["token"] = lambda cell: isinstance(cell, bytes)
    page = environment.get_template("report.html").render(report=report)
    if path.exists() and path.read_bytes()[: len(_PAGE)] not in (b"", _PAGE):
        raise FileExistsError(f"{path} is a file that is no page, and is not replaced; name another file")
    path.write_text(page, encoding="utf-8")


def _with_bar(cell: Cell) -> str:
    bar = " " + "█" * round(cell * _BAR) if isinstance(cell, Share) else ""
    return f"{show(cell):>6}{bar}" if bar else show(cell)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    match value:
        case bytes():
            return {"text": _text(value), "hex": value.hex()}
        case IntEnum():
            return value.name.lower()
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
    return value


def _text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
