"""Progress where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from trimtab_training.world.progress import reporting


def test_without_a_terminal_each_stage_has_a_line_when_it_begins_after_each_fifth_and_when_it_ends():
    written = io.StringIO()
    with reporting(Console(file=written, width=20)) as report:
        report("train a, with a long name", 0, 100)
        assert written.getvalue() == "train a, with a long name: 0 of 100\n"
        for done in range(1, 101):
            report("train a, with a long name", done, 100)
    steps = [f"train a, with a long name: {done} of 100" for done in (20, 40, 60, 80)]
    assert written.getvalue().splitlines()[1:] == [*steps, "train a, with a long name: done after 0 s"]


def test_on_a_terminal_there_is_a_bar():
    written = io.StringIO()
    with reporting(Console(file=written, force_terminal=True)) as report:
        report("train a", 50, 100)
    assert "50/100" in written.getvalue()
