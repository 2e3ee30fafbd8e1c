"""Heat maps of models against models in one SVG, which follows a light or dark page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import product

from trimtab_training.evaluation.chart import STYLE
from trimtab_training.evaluation.report import number
from trimtab_training.similarity.compare import MEASURES, Pair
from trimtab_training.similarity.recipe import ComparedModel

_CELL_WIDTH, _CELL_HEIGHT, _TOP, _LEFT, _GAP = 56, 32, 52, 28, 28
_LABEL = 8  # pixels a character of a model's label, at most
_FRAMED = ".framed { stroke: var(--ink); stroke-width: 2; }"
_POSITIVE, _NEGATIVE = "#2f7dd1", "#d1602f"


def heat_maps(models: Sequence[ComparedModel], pairs: Sequence[Pair]) -> str:
    """Draw a panel for each measure, matched and shuffled. Rows are the models whose shifts are mapped."""
    labels = [f"{place} {model.name} ({model.task})" for place, model in enumerate(models, 1)]
    width = _LEFT + len(models) * _CELL_WIDTH + _GAP
    height = _TOP + len(models) * _CELL_HEIGHT + _GAP
    left = max(_LABEL * max(map(len, labels)), 200)
    panels = enumerate(product(MEASURES, ("matched", "shuffled")))
    drawn = [
        f'<g transform="translate({left + place % 2 * width} {place // 2 * height})">'
        f"{''.join(_panel(models, pairs, measure, kind))}</g>"
        for place, (measure, kind) in panels
    ]
    named = [
        f'<text x="8" y="{row * height + _TOP + place * _CELL_HEIGHT + 21}">{escape(label)}</text>'
        for row in range(len(MEASURES))
        for place, label in enumerate(labels)
    ]
    size = f"0 0 {left + 2 * width} {len(MEASURES) * height}"
    title = f"<title>similarity of shifts</title><style>{STYLE}{_FRAMED}</style>"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img">',
            title,
            *named,
            *drawn,
            "</svg>\n",
        ]
    )


def _panel(models: Sequence[ComparedModel], pairs: Sequence[Pair], measure: str, kind: str) -> Iterator[str]:
    title = f"{measure.replace('_', ' ')}, {kind}"
    yield f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>'
    for place in range(len(models)):
        x = _LEFT + place * _CELL_WIDTH + _CELL_WIDTH // 2
        y = _TOP + place * _CELL_HEIGHT + 21
        yield f'<text class="faint" x="{x}" y="{_TOP - 8}" text-anchor="middle">{place + 1}</text>'
        yield f'<text class="faint" x="{_LEFT - 8}" y="{y}" text-anchor="end">{place + 1}</text>'
    for pair in pairs:
        row, column = models.index(pair.source), models.index(pair.target)
        yield from _cell(row, column, pair.estimates[measure][kind].mean, outlined=pair.same_task)


def _cell(row: int, column: int, value: float, *, outlined: bool) -> Iterator[str]:
    x, y = _LEFT + column * _CELL_WIDTH, _TOP + row * _CELL_HEIGHT
    colour = _POSITIVE if value >= 0 else _NEGATIVE
    frame = ' class="framed"' if outlined else ""
    yield (
        f'<rect x="{x + 2}" y="{y + 2}" width="{_CELL_WIDTH - 4}" height="{_CELL_HEIGHT - 4}" fill="{colour}"'
        f' fill-opacity="{0.8 * min(abs(value), 1):.2f}"{frame}/>'
    )
    yield f'<text x="{x + _CELL_WIDTH // 2}" y="{y + 21}" text-anchor="middle">{number(value)}</text>'
