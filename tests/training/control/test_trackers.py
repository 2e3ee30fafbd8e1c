"""TensorBoard and W&B get the figures of the JSONL log."""

from __future__ import annotations

import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trimtab_training.control import run
from trimtab_training.control.pair import train_pair

SCALARS = {"loss", "loss/data", "learning_rate", "grad_norm", "epoch"}


def train(recipe) -> None:
    run.train(recipe, "trimtab train recipe.yaml", Console(file=io.StringIO()))


def log_lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text().splitlines()]


def expected(directory: Path, name: str, every: int = 1) -> dict[int, float]:
    """What the JSONL log says of a scalar, by step: losses as means over the steps since the last report."""
    lines = log_lines(directory)
    values: dict[int, float] = {}
    for end in range(every, len(lines) + 1, every):
        last = lines[end - 1]
        if name.startswith("loss"):
            part = name.removeprefix("loss").removeprefix("/")
            losses = [line["losses"][part] if part else line["loss"] for line in lines[end - every : end]]
            values[last["step"]] = sum(losses) / every
        else:
            values[last["step"]] = last[name]
    return values


def event_scalars(directory: Path) -> dict[str, dict[int, float]]:
    read = EventAccumulator(str(directory), size_guidance={event_accumulator.SCALARS: 0}).Reload()
    return {
        name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]
    }


@pytest.mark.parametrize("every", [1, 3])
def test_tensorboard_has_the_scalars_of_the_log(make_recipe, every):
    recipe = make_recipe(report_to="tensorboard", logging_steps=every)
    train(recipe)
    written = event_scalars(recipe.output_dir / "trimtab")
    assert written.keys() == SCALARS
    for name, values in written.items():
        assert values == pytest.approx(expected(recipe.output_dir, name, every), rel=1e-6)  # float32 there


def test_each_model_of_a_pair_has_event_files_of_its_own(make_pair):
    recipe = make_pair(report_to=["tensorboard"], logging_steps=1)
    train_pair(recipe, "trimtab train recipe.yaml", Console(file=io.StringIO()))
    for part in ("plus", "minus"):
        directory = recipe.output_dir / part
        assert event_scalars(directory / "trimtab")["loss"] == pytest.approx(
            expected(directory, "loss"), rel=1e-6
        )


class WandbRun:
    def __init__(self, options: dict) -> None:
        self.options = options
        self.logged: dict[int, dict[str, float]] = {}
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        assert step not in self.logged
        self.logged[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A stand-in for the package, which asks for an account: what accelerate's tracker does with it."""
    state = SimpleNamespace(runs=[], config={})
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)

    def init(**options):
        state.runs.append(WandbRun(options))
        return state.runs[-1]

    module.init = init
    module.config = SimpleNamespace(update=lambda values, **_: state.config.update(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    known = [*accelerate.tracking._available_trackers, LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", known)
    return state


def test_wandb_gets_the_scalars_of_the_log(make_recipe, wandb):
    recipe = make_recipe(report_to="wandb", run_name="first", logging_steps=2)
    train(recipe)
    (tracked,) = wandb.runs
    assert tracked.options == {"project": "trimtab", "name": "first"}
    assert tracked.finished
    assert wandb.config["learning_rate"] == recipe.learning_rate
    assert wandb.config["template.dtype"] == "float32"
    assert tracked.logged.keys() == {2, 4, 6}
    for name in SCALARS:
        values = {step: values[name] for step, values in tracked.logged.items()}
        assert values == expected(recipe.output_dir, name, every=2)


def test_both_trackers_at_once(make_recipe, wandb):
    recipe = make_recipe(report_to=["tensorboard", "wandb"], logging_steps=1)
    train(recipe)
    (tracked,) = wandb.runs
    losses = {step: values["loss"] for step, values in tracked.logged.items()}
    assert event_scalars(recipe.output_dir / "trimtab")["loss"] == pytest.approx(losses, rel=1e-6)
