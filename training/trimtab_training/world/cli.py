"""`trimtab world`: make the small world, and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trimtab_training.world.signals import signals_as_exits

if TYPE_CHECKING:
    from trimtab_training.world.report import ByModel
    from trimtab_training.world.world import World, WorldSettings

app = typer.Typer(
    help="The small world in which cross-model control can be seen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Argument(help="Where the world is, or is to be made.")]
Seed = Annotated[int, typer.Option(help="Everything that is drawn comes from it.")]


@app.command()
def make(directory: Directory, seed: Seed = 1) -> None:
    """Make the world in DIRECTORY: three base models and a control. Takes minutes, once."""
    with signals_as_exits(), failing_softly():
        world = make_visibly(directory, seed)
    print(json.dumps({"world": str(world.directory), "seconds": world.seconds, "recall": world.recall}))


@app.command()
def evaluate(
    seeds: Annotated[list[int], typer.Argument(help="A world is made, or found, for each.")],
    directory: Annotated[Path, typer.Option(help="Where the worlds are.")] = Path(".trimtab/worlds"),
    output: Annotated[
        Path | None, typer.Option(help="Also write the tables here: Markdown, or JSON in a file named so.")
    ] = None,
) -> None:
    """Measure what the control does to each model, offline, in the world of each seed; and the medians."""
    from trimtab_training.world.report import markdown, medians, plain

    with signals_as_exits(), failing_softly():
        measured = {seed: _evaluated(make_visibly(directory / str(seed), seed)) for seed in seeds}
    tables = {f"seed {seed}": results for seed, results in measured.items()}
    tables["median"] = medians(list(measured.values()))
    text = "\n\n".join(f"### {title}\n\n{markdown(results)}" for title, results in tables.items())
    data = json.dumps({title: plain(results) for title, results in tables.items()})
    if output is not None:
        output.write_text((data if output.suffix == ".json" else text) + "\n", encoding="utf-8")
    print(text)
    print(data)


@contextmanager
def failing_softly() -> Iterator[None]:
    """An error that a user can do something about ends the command with its message alone."""
    from trimtab_training.world.world import GateError, WorldError

    try:
        yield
    except (GateError, WorldError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(1) from error


def make_visibly(directory: Path, seed: int, settings: WorldSettings | None = None) -> World:
    """Make the world and show the progress of each model on stderr."""
    from trimtab_training.world.progress import reporting
    from trimtab_training.world.world import make_world

    with reporting(Console(stderr=True)) as report:
        return make_world(
            *(directory, seed, lambda task, done, total: report(f"train {task}", done, total), settings)
        )


def _evaluated(world: World) -> ByModel:
    from transformers.utils import logging

    from trimtab_training.world.evaluate import evaluate as measure
    from trimtab_training.world.offline import Offline

    logging.disable_progress_bar()
    return {
        model: measure(world.held_out, Offline(world, model).answer, dialect=world.dialect)
        for model in world.models
    }
