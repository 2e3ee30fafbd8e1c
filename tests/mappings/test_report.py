"""One report, for a terminal, for a program and as a page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from trimtab_mappings import Coverage, Kind
from trimtab_mappings.report import (
    Report,
    Section,
    Share,
    print_report,
    show,
    show_token,
    to_json,
    write_html,
)

REPORT = Report(
    "A title & more",
    {"rows": 12_345, "name": "<script>alert(1)</script>"},
    [
        Section(
            "Tokens",
            ("token", "count", "share", "nothing"),
            [(b"[bold]a[/bold]", 1, Share(1.0), None), (b"\xe4", 20, Share(0.25), None)],
            note="a note",
        )
    ],
)


@dataclass(frozen=True)
class Result:
    token: bytes
    kind: Kind
    coverage: Coverage
    counts: dict[int, int]
    nested: list[bytes]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", '" the"'),
        (b"\n\t", r'"\n\t"'),
        ("中".encode(), '"中"'),
        (b"\xe4\xb8", "<E4 B8>"),
        (b'"', r'"\""'),
        (b"", '""'),
        (b"a" * 30, '"' + "a" * 24 + '"… 30 characters'),
    ],
)
def test_a_token_is_shown_as_its_text_or_its_bytes(token, shown):
    assert show_token(token) == shown


@pytest.mark.parametrize(
    ("cell", "shown"), [(12345, "12,345"), (Share(0.1234), "12.3%"), (0.25, "0.25"), (None, "-"), ("a", "a")]
)
def test_a_cell_is_shown_by_its_kind(cell, shown):
    assert show(cell) == shown


def test_json_has_tokens_as_text_and_bytes_and_kinds_by_name():
    result = Result(b"\xe4", Kind.PREFIX, Coverage(1, 2, 3, 4, 5), {1: 2}, ["é".encode()])
    assert json.loads(to_json(result)) == {
        "token": {"text": None, "hex": "e4"},
        "kind": "prefix",
        "coverage": {"exact": 1, "prefix": 2, "extension": 3, "role": 4, "none": 5},
        "counts": {"1": 2},
        "nested": [{"text": "é", "hex": "c3a9"}],
    }


def test_the_terminal_shows_everything_and_takes_nothing_for_markup(capsys):
    print_report(REPORT)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "A title & more",
        "  rows: 12,345",
        "  name: <script>alert(1)</script>",
        "",
        "Tokens",
        "token             count  share                nothing",
        '"[bold]a[/bold]"      1  100.0% ████████████        -',
        "<E4>                 20   25.0% ███                 -",
        "a note",
    ]


def test_a_narrow_terminal_cuts_tokens_and_no_id(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ("token", "id", "kind", "control", "id", "distance", "uses")
    row = (b"a" * 30, "#151,643", "extension", b"b" * 30, "#262,143", 12, 1_234_567)
    print_report(Report("", sections=[Section("The worst rows", columns, [row] * 2)]))
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) <= 80 for line in lines] == [True] * len(lines)
    for line in lines[-2:]:
        for cell in ("#151,643", "extension", "#262,143", "12", "1,234,567", '"aaaaaaa', "…"):
            assert cell in line


class Page(HTMLParser):
    """The text of a page, and whatever it would load."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags, self.loads, self.widths = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in {"src", "href", "srcset", "data"}]
        self.widths += [float(value) for name, value in attributes if (tag, name) == ("rect", "width")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path):
    path = tmp_path / "report.html"
    write_html(REPORT, path)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.loads == []
    assert "script" not in page.tags
    assert "url(" not in source
    assert "@import" not in source


def test_the_page_shows_everything_and_draws_the_shares(tmp_path):
    path = tmp_path / "report.html"
    write_html(REPORT, path)
    page = Page(path.read_text(encoding="utf-8"))
    shown = [
        "A title & more",
        "12,345",
        "<script>alert(1)</script>",
        '"[bold]a[/bold]"',
        "<E4>",
        "25.0%",
        "a note",
    ]
    assert [text for text in shown if text not in page.texts] == []
    assert page.widths == [100.0, 25.0]
