"""Charts, each as one SVG that follows the reader's light or dark page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 780, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 244, 40, 52
_STYLE = """
svg { --ink: #1b1f24; --faint: #6a737d; --line: #d7dce1; font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ec; --faint: #98a2ad; --line: #343b43; } }
text { fill: var(--ink); } .faint { fill: var(--faint); } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; } .whisker { stroke: var(--ink); }
"""
_COLOURS = ("#2f7dd1", "#d1602f", "#2fa36b", "#9a5fd0", "#b58900", "#c2477f")
_UPRIGHT = 'transform="rotate(-90)" text-anchor="middle"'

Point = tuple[float, float]


Bar = tuple[float, float, float]
"""A share from 0 to 1, and the ends of its whisker."""


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """Draw `lines`, points of positive numbers by name; at most as many as there are colours.

    Both axes are logarithmic. The grid is at powers of two of x and powers of ten of y.
    """
    points = [point for line in lines.values() for point in line]
    x_axis = _Axis([x for x, _ in points], 2, _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([y for _, y in points], 10, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *_grid(x_axis, y_axis),
        f'<text class="faint" x="{_LEFT}" y="{_HEIGHT - 10}">{escape(x_label)}</text>',
        f'<text class="faint" x="{-_HEIGHT / 2}" y="14" {_UPRIGHT}>{escape(y_label)}</text>',
        *_lines(lines, x_axis, y_axis),
    ]
    return _svg(title, parts)


def bar_chart(title: str, groups: Mapping[str, Mapping[str, Bar]]) -> str:
    """Draw bars by the names of their group and their own; bars of a name have one colour."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colours = dict(zip(names, _COLOURS, strict=False))
    parts = [*_shares()]
    span = (_WIDTH - _RIGHT - _LEFT) / len(groups)
    for number, (group, bars) in enumerate(groups.items()):
        middle = _LEFT + (number + 0.5) * span
        y = _HEIGHT - _BOTTOM + 18
        parts.append(f'<text class="faint" x="{middle}" y="{y}" text-anchor="middle">{escape(group)}</text>')
        width = 0.8 * span / len(names)
        for place, (name, bar) in enumerate(bars.items()):
            x = middle + (place - len(bars) / 2) * width
            parts += _bar(bar, colours[name], round(x, 1), round(0.85 * width, 1))
    parts += [
        part for number, (name, colour) in enumerate(colours.items()) for part in _key(number, name, colour)
    ]
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _height(share: float) -> float:
    """Where a share from 0 to 1 is on the y axis."""
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)


def _shares() -> Iterator[str]:
    """The grid of a bar chart."""
    for fifth in range(6):
        yield from _level(_height(fifth / 5), f"{fifth / 5:.1f}")


def _level(y: float, label: str) -> tuple[str, str]:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>',
        f'<text class="faint" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>',
    )


def _bar(bar: Bar, colour: str, x: float, width: float) -> tuple[str, str]:
    top, low, high = map(_height, bar)
    middle = round(x + width / 2, 1)
    return (
        f'<rect fill="{colour}" x="{x}" y="{top}" width="{width}" height="{round(_height(0) - top, 1)}"/>',
        f'<line class="whisker" x1="{middle}" x2="{middle}" y1="{low}" y2="{high}"/>',
    )


def _key(number: int, name: str, colour: str) -> tuple[str, str]:
    """A line of the legend."""
    x, y = _WIDTH - _RIGHT + 12, _TOP + 12 + 20 * number
    return (
        f'<line stroke="{colour}" stroke-width="2" x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}"/>',
        f'<text x="{x + 24}" y="{y}">{escape(name)}</text>',
    )


class _Axis:
    """Numbers between two powers of `base`, as places between `start` and `end`."""

    def __init__(self, numbers: Sequence[float], base: int, start: float, end: float) -> None:
        # rounded: logarithms of powers are not whole
        self._low = math.floor(round(math.log(min(numbers), base), 6))
        self._high = max(math.ceil(round(math.log(max(numbers), base), 6)), self._low + 1)
        self._base, self._start, self._end = base, start, end

    @property
    def ticks(self) -> list[float]:
        return [float(self._base) ** power for power in range(self._low, self._high + 1)]

    def place(self, number: float) -> float:
        share = (math.log(number, self._base) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for number in x_axis.ticks:
        x = x_axis.place(number)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="faint" x="{x}" y="{bottom + 18}" text-anchor="middle">{number:,g}</text>')
    for number in y_axis.ticks:
        parts += _level(y_axis.place(number), f"{number:,g}")
    return parts


def _lines(lines: Mapping[str, Sequence[Point]], x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for number, ((name, points), colour) in enumerate(zip(lines.items(), _COLOURS, strict=False)):
        places = " ".join(f"{x_axis.place(x)},{y_axis.place(y)}" for x, y in points)
        parts += [f'<polyline stroke="{colour}" points="{places}"/>', *_key(number, name, colour)]
    return parts
