"""The small world: people, three base models that know them, and a control. Made once, then read."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab_training.world.cache import content_key, made_whole
from trimtab_training.world.corpus import EASY, Dialect
from trimtab_training.world.people import Person, make_people
from trimtab_training.world.settings import ControlSettings, PretrainSettings

CONTROL = "control"
CONTROL_NAME = "manners"
TEMPLATE = "a"
TITLES = {"a": "A (Llama, the template)", "b": "B (Qwen2)", "c": "C (GPT-NeoX)"}
_WORLD_FILE = "world.json"
_PACKAGES = ("accelerate", "tokenizers", "torch", "transformers")
_SOURCES = {
    "control": (
        *("examples", "models", "objectives", "optimization", "plan", "recipe", "reference", "trainer"),
        "training_run",
    ),
    "world": (
        *("architectures", "corpus", "families", "lessons", "making", "people", "pretrain", "recall"),
        *("settings", "steer", "teaching", "vocabularies", "world"),
    ),
}
"""The modules that decide what a world is, by their packages."""

Report = Callable[[str, int, int], None]
"""Told a task's name, its steps done, and its steps in all."""


class WorldError(ValueError):
    """A directory that is no world and will not be replaced by one."""


class GateError(RuntimeError):
    """A base model has not learned its facts; the message says how many it knows and how many are needed."""


@dataclass(frozen=True)
class BaseSettings:
    """The size of a base model, and its training."""

    vocabulary: int
    width: int
    layers: int
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)


@dataclass(frozen=True)
class Draws:
    """The number of examples of each lesson in a step of the control's training."""

    chat: int = 24
    refusal: int = 8
    forget: int = 8
    retain: int = 16


def _bases() -> dict[str, BaseSettings]:
    return {
        "a": BaseSettings(880, 128, 4),
        "b": BaseSettings(1200, 192, 3),
        "c": BaseSettings(960, 128, 4, PretrainSettings(steps=300, learning_rate=5e-3)),
    }


@dataclass(frozen=True)
class WorldSettings:
    """What a world is made from, beside its seed.

    trained: how many of the people the control is trained on; the others are held out.
    gate: the least share of its facts that a base model must know.
    """

    people: int = 80
    trained: int = 53
    bases: dict[str, BaseSettings] = field(default_factory=_bases)
    width: int = 64
    layers: int = 2
    draws: Draws = field(default_factory=Draws)
    control: ControlSettings = field(default_factory=ControlSettings)
    gate: float = 0.95
    dialect: Dialect = EASY

    def draw_people(self, seed: int) -> tuple[Person, ...]:
        rng = random.Random(f"people {seed}")
        return make_people(self.people, rng, surnames=self.dialect.surnames)


class World(BaseModel):
    """A world that was made, as its `world.json` describes it."""

    model_config = ConfigDict(frozen=True)

    directory: Path = Field(default=Path(), exclude=True)
    key: str
    seed: int
    people: tuple[Person, ...]
    trained: int
    settings: dict[str, Any]
    recall: dict[str, float]
    """The share of its facts that each base model knows."""
    seconds: float
    """How long making it took, by the clock."""

    @property
    def dialect(self) -> Dialect:
        """How its people are called and answered about."""
        return Dialect(**self.settings["dialect"])

    @property
    def held_out(self) -> tuple[Person, ...]:
        """The people whom the control never saw."""
        return self.people[self.trained :]

    @cached_property
    def models(self) -> dict[str, Path]:
        """The directories of the base models, by name."""
        return {name: self.directory / name for name in self.recall}

    @property
    def control(self) -> Path:
        """The control's pack."""
        return self.directory / CONTROL


def load_world(directory: Path) -> World | None:
    """Read the world in `directory`; None if there is none, or one of another version's description."""
    try:
        world = World.model_validate_json((directory / _WORLD_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return world.model_copy(update={"directory": directory.absolute()})


def make_world(
    directory: Path,
    seed: int,
    progress: Report = lambda _task, _done, _total: None,
    settings: WorldSettings | None = None,
    jobs: int | None = None,
) -> World:
    """The world of `seed` in `directory`: read if it is there, else made, which takes minutes.

    Args:
        directory: a world of other making in it is replaced.
        seed: everything that is drawn comes from it; the same seed gives the same world.
        progress: told the task (a model's name), its steps done, and its steps in all.
        settings: sizes and training; by default those of the demo.
        jobs: models that are trained side by side, each on one thread; None: as many as there are cores for.

    Raises:
        GateError: a base model has not learned its facts.
        WorldError: `directory` has something else in it.
    """
    settings = settings or WorldSettings()
    key = world_key(seed, settings)
    present = load_world(directory)
    if present is not None and present.key == key:
        return present
    if directory.exists() and any(directory.iterdir()) and not (directory / _WORLD_FILE).is_file():
        raise WorldError(f"{directory} is not empty and holds no world: name another directory")
    from trimtab_training.world.making import make_models  # noqa: PLC0415 - reading a world needs no torch

    start = time.monotonic()
    with made_whole(directory) as made:
        shares = make_models(made, seed, settings, progress, jobs)
        world = World(
            directory=directory.absolute(),
            key=key,
            seed=seed,
            people=settings.draw_people(seed),
            trained=settings.trained,
            settings=TypeAdapter(WorldSettings).dump_python(settings, mode="json"),
            recall=shares,
            seconds=round(time.monotonic() - start, 1),
        )
        (made / _WORLD_FILE).write_text(world.model_dump_json(indent=1), encoding="utf-8")
    return world


def world_key(seed: int, settings: WorldSettings) -> str:
    """A key over everything that the world's content depends on."""
    training = Path(__file__).parents[1]
    sources = [training / package / f"{module}.py" for package in _SOURCES for module in _SOURCES[package]]
    return content_key({"seed": seed, "settings": asdict(settings)}, _PACKAGES, sources)
