"""Reports a run: a line of JSON a step, a progress bar, a plot of the loss, and trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trimtab_training.control.errors import TrainingError
from trimtab_training.control.recipe import TrainRecipe
from trimtab_training.control.trainer import Step, logged

LOG_FILE = "trainer_log.jsonl"
PLOT_FILE = "loss.svg"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_WIDTH, _HEIGHT, _MARGIN = 760, 320, 48


def require_trackers(recipe: TrainRecipe) -> None:
    """Check that the packages of `report_to` are installed.

    Raises:
        TrainingError: one is not.
    """
    for name in recipe.trackers:
        if not any(find_spec(package) for package in _PACKAGES[name]):
            raise TrainingError(f"`report_to`: the package for {name!r} is not installed. pip install {name}")


class RunLog:
    """The log of a run on its main process; other processes have none."""

    def __init__(
        self,
        recipe: TrainRecipe,
        accelerator: Accelerator,
        total_steps: int,
        console: Console,
        part: str | None = None,
    ) -> None:
        """Args: part: the name of the model and of its folder in `output_dir`, if the recipe has several."""
        self._recipe = recipe
        self._accelerator = accelerator
        self._total = total_steps
        self._part = part
        self._directory = recipe.output_dir / (part or "")
        self.lines: list[dict[str, Any]] = []
        self._begun = time.monotonic()
        self._earlier = 0.0
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
        )
        self._progress = Progress(*columns, console=console)
        self._bar = self._progress.add_task(part or "train", total=total_steps)

    def __enter__(self) -> Self:
        if self._recipe.trackers:
            name = "-".join(filter(None, (self._recipe.run_name, self._part)))
            options = {"wandb": {"name": name}} if name else {}
            flat = _flat(self._recipe.model_dump(mode="json"))
            self._accelerator.init_trackers("trimtab", config=flat, init_kwargs=options)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._recipe.trackers:
            self._accelerator.end_training()

    def go_on(self, step: int, earlier: Path) -> None:
        """Continue the log that is in the directory `earlier`: take its lines up to `step`."""
        file = earlier / LOG_FILE
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        self.lines = [line for line in lines if line["step"] <= step]
        self._earlier = self.lines[-1]["elapsed_time"] if self.lines else 0.0
        self._progress.update(self._bar, completed=step)
        written = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self._directory / LOG_FILE).write_text(written, encoding="utf-8")
        if self.lines:
            self._plot()

    @property
    def seconds(self) -> float:
        """How long the run has taken, with its earlier parts."""
        return self._earlier + time.monotonic() - self._begun

    def add(self, step: Step) -> None:
        line = {**logged(step), "total_steps": self._total, "elapsed_time": round(self.seconds, 3)}
        self.lines.append(line)
        with (self._directory / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._progress.update(self._bar, completed=step.step)
        if step.step % self._recipe.logging_steps == 0 or step.step == self._total:
            self._tell(step)

    def _tell(self, step: Step) -> None:
        recent = self.lines[-self._recipe.logging_steps :]
        values = {
            "loss": _mean([line["loss"] for line in recent]),
            **{f"loss/{name}": _mean([line["losses"][name] for line in recent]) for name in step.losses},
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "epoch": step.epoch,
        }
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        place = f"{self._part}, step" if self._part else "step"
        self._progress.console.print(f"{place} {step.step}: {shown}", highlight=False)
        if self._recipe.trackers:
            self._accelerator.log(values, step=step.step)
        self._plot()

    def _plot(self) -> None:
        (self._directory / PLOT_FILE).write_text(loss_plot(self.lines), encoding="utf-8")


def loss_plot(lines: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the loss over the steps: each step's, and the mean of those about it."""
    losses = [float(line["loss"]) for line in lines]
    lowest, highest = min(losses), max(losses)
    span = (highest - lowest) or 1.0

    def points(values: Sequence[float]) -> str:
        across = (_WIDTH - 2 * _MARGIN) / max(len(values) - 1, 1)
        down = (_HEIGHT - 2 * _MARGIN) / span
        return " ".join(
            f"{_MARGIN + across * i:.1f},{_HEIGHT - _MARGIN - (value - lowest) * down:.1f}"
            for i, value in enumerate(values)
        )

    near = max(len(losses) // 50, 1)
    smooth = [_mean(losses[max(i - near, 0) : i + near + 1]) for i in range(len(losses))]
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">
<title>The loss of each step, in nats</title>
<style>svg {{ font: 13px system-ui, sans-serif; fill: #777; stroke-width: 2 }} text {{ stroke: none }}</style>
<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" fill="none" stroke="#999" stroke-width="1"/>
<polyline points="{points(losses)}" fill="none" stroke="#8ab4e8" stroke-width="1"/>
<polyline points="{points(smooth)}" fill="none" stroke="#2f7dd1"/>
<text x="{_MARGIN}" y="{_MARGIN - 12}">loss, in nats: {highest:.3g} at the top</text>
<text x="{_MARGIN}" y="{bottom + 18}">{lowest:.3g} at the bottom</text>
<text x="{right}" y="{bottom + 18}" text-anchor="end">step {lines[-1]["step"]}</text>
</svg>
"""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, with values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str)) else json.dumps(value)
    return flat
