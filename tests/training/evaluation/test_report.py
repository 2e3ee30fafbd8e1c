"""Tables and plots of results."""

from __future__ import annotations

import pytest

from trimtab_training.evaluation.bootstrap import Estimate
from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.report import cells_table, interval, markdown, number, plot
from trimtab_training.evaluation.results import Cell


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, ".00"),
        (0.034, ".03"),
        (0.5, ".50"),
        (1, "1.00"),
        (0.996, "1.00"),
        (-0.25, "-.25"),
        (10.5, "10.50"),
    ],
)
def test_shares_have_two_decimals(value, text):
    assert number(value) == text


def test_an_interval():
    assert interval(Estimate(0.5, 0.25, 1.0)) == ".50 [.25, 1.00]"


def cell(strength, routing, mean):
    return Cell("g", "exact", Setting(strength, routing), 7, Estimate(mean, mean, mean), None)


def test_the_target_alone_is_in_the_rows_of_all_routings():
    text = markdown(cells_table([cell(0, None, 0.1), cell(1, "path", 0.2), cell(1, "pm-mined", 0.3)]))
    assert text.splitlines()[2:] == [
        "| g | exact | 7 | path | .10 [.10, .10] | .20 [.20, .20] |",
        "| g | exact | 7 | pm-mined | .10 [.10, .10] | .30 [.30, .30] |",
    ]


def test_without_control_there_is_one_row():
    assert markdown(cells_table([cell(0, None, 0.1)])).splitlines()[2:] == [
        "| g | exact | 7 | - | .10 [.10, .10] |"
    ]


def test_a_plot_shows_higher_shares_higher():
    text = plot([cell(0, None, 0.1), cell(1, "path", 0.9)])
    heights = [
        float(part.split('"')[1])
        for part in text.split("<circle")[1:]
        for part in [part[part.index("cy=") :]]
    ]
    assert heights[0] > heights[1]


def test_names_are_escaped_in_a_plot():
    text = plot([Cell("a < b & c", "exact", Setting(0, None), 1, Estimate(0, 0, 0), None)])
    assert "a &lt; b &amp; c" in text
