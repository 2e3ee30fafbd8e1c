"""Line charts with intervals: panels below one another in one SVG, which follows a light or dark page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = 780, 260, 52, 236, 36, 44
_COLOURS = ("#2f7dd1", "#d1602f", "#2fa36b", "#9a5fd0", "#b58900", "#c2477f", "#5b8c8c", "#8a5a44")
STYLE = """
svg { --ink: #1b1f24; --faint: #6a737d; --line: #d7dce1; font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ec; --faint: #98a2ad; --line: #343b43; } }
text { fill: var(--ink); } .faint { fill: var(--faint); } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; } .whisker { stroke-width: 1; opacity: .7; }
"""


class Point(NamedTuple):
    """A share from 0 to 1 at a place `x`, and the ends of its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """Lines by their names, under a title."""

    title: str
    lines: Mapping[str, Sequence[Point]]


def panels_chart(panels: Sequence[Panel], x_label: str) -> str:
    """Draw `panels`, all over the same x axis."""
    places = sorted({point.x for panel in panels for line in panel.lines.values() for point in line})
    height = _PANEL * len(panels)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            f"<title>{escape(', '.join(panel.title for panel in panels))}</title><style>{STYLE}</style>",
            *(
                f'<g transform="translate(0 {place * _PANEL})">{"".join(_panel(panel, places, x_label))}</g>'
                for place, panel in enumerate(panels)
            ),
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, places: Sequence[float], x_label: str) -> Iterator[str]:
    yield f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(panel.title)}</text>'
    yield f'<text class="faint" x="{_LEFT}" y="{_PANEL - 6}">{escape(x_label)}</text>'
    yield from _grid(places)
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        moved = [point._replace(x=_x(point.x, places) + 3 * number) for point in line]
        yield from _line(moved, colour)
        yield from _key(number, name, colour)


def _grid(places: Sequence[float]) -> Iterator[str]:
    for fifth in range(6):
        y = _y(fifth / 5)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="faint" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{fifth / 5:.1f}</text>'
    for place in places:
        x = _x(place, places)
        yield f'<text class="faint" x="{x}" y="{_PANEL - _BOTTOM + 18}" text-anchor="middle">{place:g}</text>'


def _line(points: Sequence[Point], colour: str) -> Iterator[str]:
    joined = " ".join(f"{point.x},{_y(point.y)}" for point in points)
    yield f'<polyline stroke="{colour}" points="{joined}"/>'
    for point in points:
        ends = f'y1="{_y(point.low)}" y2="{_y(point.high)}"'
        yield f'<line class="whisker" stroke="{colour}" x1="{point.x}" x2="{point.x}" {ends}/>'
        yield f'<circle fill="{colour}" cx="{point.x}" cy="{_y(point.y)}" r="3"/>'


def _key(number: int, name: str, colour: str) -> Iterator[str]:
    x, y = _WIDTH - _RIGHT + 20, _TOP + 8 + 20 * number
    yield f'<line stroke="{colour}" stroke-width="2" x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}"/>'
    yield f'<text x="{x + 24}" y="{y}">{escape(name)}</text>'


def _x(place: float, places: Sequence[float]) -> float:
    span = (places[-1] - places[0]) or 1.0
    return round(_LEFT + 8 + (place - places[0]) / span * (_WIDTH - _RIGHT - _LEFT - 16), 1)


def _y(share: float) -> float:
    return round(_PANEL - _BOTTOM - share * (_PANEL - _BOTTOM - _TOP), 1)
