"""What each routing carries of one control to targets whose vocabularies cut words otherwise.

Two kinds of small world, both made from nothing: an easy one, in which it hardly matters, and a hard one, in
which answers begin with words and names that the control spells in pieces and the targets have whole. The
template is the ceiling: its vocabulary is the control's, so that nothing is to be routed. Greedy and offline,
on people whom the control never saw; and the loss of the ideal chat answers, which also tells apart what
greedy decoding does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from chart import bar_chart
from trimtab_training.world import corpus
from trimtab_training.world.cli import make_visibly
from trimtab_training.world.evaluate import Figure, Kind, questions, score
from trimtab_training.world.offline import Offline
from trimtab_training.world.settings import ControlSettings, PretrainSettings
from trimtab_training.world.steer import ROUTINGS
from trimtab_training.world.world import TEMPLATE, TITLES, BaseSettings, World, WorldSettings

STRENGTHS = (1.0, 1.5)
CEILING, WITHOUT = "ceiling", "without"
HARD = WorldSettings(
    bases={
        "a": BaseSettings(520, 128, 4, PretrainSettings(steps=450)),
        "b": BaseSettings(1231, 192, 3, PretrainSettings(steps=360)),
        "c": BaseSettings(800, 128, 4, PretrainSettings(steps=360, learning_rate=5e-3)),
    },
    control=ControlSettings(steps=400),
    dialect=corpus.HARD,
)
WORLDS = {"hard": HARD, "easy": WorldSettings()}
SHOWN = (Figure.EXACT, Figure.REFUSED, Figure.LEAKED_CHAT, Figure.LEAKED_PLAIN, Figure.KEPT)
LOSS = "loss of the ideal chat answer, nats"


@dataclass(frozen=True)
class Result:
    """One routing on one target of one world; figures by their names."""

    world: str
    seed: int
    target: str
    routing: str
    strength: float
    figures: dict[str, float]


def main(
    seeds: Annotated[list[int], typer.Argument(help="A world is made, or found, for each.")],
    world: Annotated[list[str], typer.Option(help="Of these kinds; may be repeated.")] = list(WORLDS),
    routing: Annotated[list[str], typer.Option(help="May be repeated.")] = list(ROUTINGS),
    directory: Annotated[Path, typer.Option(help="Where the worlds are.")] = Path(".trimtab/worlds"),
    output: Annotated[
        Path | None, typer.Option(help="Write OUTPUT.json, OUTPUT.md and OUTPUT-WORLD.svg as well.")
    ] = None,
) -> None:
    """Measure every routing on every target in the worlds of all seeds."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = []
    for kind in world:
        for seed in seeds:
            found = make_visibly(directory / kind / str(seed), seed, WORLDS[kind])
            results += [*measure(kind, found, routing)]
    text = "\n\n".join(f"### {kind} worlds\n\n{markdown(of(results, world=kind))}" for kind in world)
    data = {"benchmark": "routings", "seeds": seeds, "results": [asdict(result) for result in results]}
    print(text)
    print(json.dumps(data))
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        for kind in world:
            drawn = chart(kind, of(results, world=kind, strength=STRENGTHS[0]))
            output.with_name(f"{output.name}-{kind}.svg").write_text(drawn, encoding="utf-8")


def measure(kind: str, world: World, routings: Sequence[str]) -> Iterator[Result]:
    """The template under its control, then every other model under every routing; each without it first."""
    asked = questions(world.held_out, world.dialect)
    chats = [question for question in asked if question.kind is Kind.CHAT]
    for target in world.models:
        for routing in [CEILING] if target == TEMPLATE else routings:
            model = Offline(world, target, "exact" if routing == CEILING else routing)
            first = routing in (CEILING, routings[0])
            for strength in (0.0, *STRENGTHS) if first else STRENGTHS:
                found = score(asked, model.answer(asked, strength))
                figures = {figure.value: round(found[figure], 4) for figure in SHOWN}
                figures[LOSS] = round(model.loss(chats, strength), 4)
                yield Result(kind, world.seed, target, routing if strength else WITHOUT, strength, figures)


def of(results: Sequence[Result], **wanted: object) -> list[Result]:
    """Those of `results` whose fields are as `wanted`."""
    return [each for each in results if all(getattr(each, key) == value for key, value in wanted.items())]


def spread(results: Sequence[Result], figure: str) -> tuple[float, float, float]:
    """The median, the least and the most of a figure over seeds."""
    values = [result.figures[figure] for result in results]
    return median(values), min(values), max(values)


def markdown(results: Sequence[Result]) -> str:
    """A line for each target, routing and strength: the median of each figure, and its spread over seeds."""
    names = [*(figure.value for figure in SHOWN), LOSS]
    head = ["target", "routing", "strength", *names]
    lines = [head, ["---"] * len(head)]
    for target, routing, strength in dict.fromkeys((r.target, r.routing, r.strength) for r in results):
        some = of(results, target=target, routing=routing, strength=strength)
        cells = (cell(*spread(some, name)) for name in names)
        lines.append([TITLES[target], routing, f"{strength:g}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(middle: float, least: float, most: float) -> str:
    return f"{middle:.2f}" if least == most else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def chart(kind: str, results: Sequence[Result]) -> str:
    """Exact answers by target and routing; a bar is the median over seeds, its whisker the spread."""
    bars: dict[str, dict[str, tuple[float, float, float]]] = {}
    for target, routing in dict.fromkeys((r.target, r.routing) for r in results):
        found = spread(of(results, target=target, routing=routing), Figure.EXACT.value)
        bars.setdefault(TITLES[target], {})[routing] = found
    return bar_chart(f"Chat answers exactly right, {kind} worlds, strength {STRENGTHS[0]:g}", bars)


if __name__ == "__main__":
    typer.run(main)
