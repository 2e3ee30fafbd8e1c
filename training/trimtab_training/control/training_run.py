"""One model's training from its first step to its last: its directory, checkpoints, log and signals."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from trimtab_training.control.data import Data, DataFacts
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.examples import marked_text
from trimtab_training.control.log import RunLog
from trimtab_training.control.pack_writer import RECIPE_FILE
from trimtab_training.control.recipe import TrainRecipe
from trimtab_training.control.signals import collected_signals
from trimtab_training.control.trainer import Step, Trainer

IRRELEVANT = frozenset(
    {
        *("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "run_name"),
        *("resume_from_checkpoint", "overwrite_output_dir", "name", "description", "use_cpu"),
    }
)
"""Keys that may differ between a run and the one that continues from its checkpoint."""


class InterruptedRunError(RuntimeError):
    """A signal ended the training; the message says how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class TrainingRun:
    """A training with all that it keeps in `directory`.

    identity: what it is made from, see `run_identity`.
    """

    recipe: TrainRecipe
    directory: Path
    accelerator: Accelerator
    trainer: Trainer
    log: RunLog
    identity: str

    def resume(self, checkpoint: Path | None) -> None:
        """Continue from a checkpoint, with the log that is beside it; None: begin.

        Raises:
            TrainingError: the checkpoint is not whole, or is another run's.
        """
        if checkpoint is not None:
            self.trainer.load(checkpoint, self.identity)
        if self.accelerator.is_main_process:
            self.log.go_on(self.trainer.done, self.directory if checkpoint is None else checkpoint.parent)

    def run(self, *, keeps_last: bool = False) -> int | None:
        """Run the steps, with checkpoints between them and one at a signal.

        Args:
            keeps_last: write a checkpoint after the last step too.

        Returns:
            The signal that came, to this process or another one.
        """
        stops = False
        with self.log, collected_signals() as received:

            def on_step(step: Step) -> bool:
                nonlocal stops
                if self.accelerator.is_main_process:
                    self.log.add(step)
                stops = _on_any_process(self.accelerator, bool(received))
                is_last = keeps_last and step.step == self.trainer.total_steps
                if stops or is_last or step.step % self.recipe.save_steps == 0:
                    self.trainer.save(self.directory, self.identity)
                return not stops

            self.trainer.run(on_step)
        return (received or [signal.SIGTERM])[0] if stops else None

    def interrupted(self, signal_number: int, part: str = "") -> InterruptedRunError:
        """The error for a signal. `part` names the model if there are several."""
        return InterruptedRunError(
            signal_number,
            f"Stopped after step {self.trainer.done} of {self.trainer.total_steps}{part}."
            " To go on, repeat the command with `--resume_from_checkpoint true`",
        )


def make_accelerator(recipe: TrainRecipe, directory: Path) -> Accelerator:
    """Make an accelerator for one model, whose trackers write into `directory`."""
    return Accelerator(
        cpu=recipe.use_cpu,
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.trackers or None,
        project_dir=directory,
        step_scheduler_with_optimizer=False,
    )


def run_identity(keys: Mapping[str, Any], facts: Sequence[DataFacts], processes: int) -> str:
    """Return the sha256 of what a run is made from: recipe, data, and the number of processes."""
    made_from = [keys, [asdict(each) for each in facts], processes]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def require_output_dir(recipe: TrainRecipe) -> None:
    """Make the output directory, empty unless the run goes on in it.

    Raises:
        TrainingError: there is something in it, and the recipe does not say what to do with it.
    """
    directory = recipe.output_dir
    if directory.is_dir() and any(directory.iterdir()) and not recipe.resume_from_checkpoint:
        if not recipe.overwrite_output_dir:
            raise TrainingError(
                f"`output_dir` {directory} is not empty."
                " Set `resume_from_checkpoint: true` to go on from its last checkpoint,"
                " `overwrite_output_dir: true` to delete it, or name another directory"
            )
        if not (directory / RECIPE_FILE).is_file() or Path.cwd().is_relative_to(directory.resolve()):
            raise TrainingError(
                f"`output_dir` {directory} is not empty and is not the directory of a training alone,"
                " so it is not overwritten. Name another directory"
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def write_recipe(recipe: TrainRecipe) -> None:
    """Write the recipe into its `output_dir`, with the options of the command line."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    (recipe.output_dir / RECIPE_FILE).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def tell_data(data: Data, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the size of each data set, and its first example with the learned tokens in brackets."""
    for each, facts in zip(data.sets, data.facts, strict=True):
        cut = f", {facts.shortened} cut at `max_length`" if facts.shortened else ""
        mass = facts.teacher_mass
        kept = "" if mass is None else f", {mass:.4%} of the teacher's probability kept exactly"
        console.print(
            f"{facts.name}: {facts.objective}, {facts.records} records, {facts.answer_tokens} answer"
            f" tokens{cut}{kept}",
            highlight=False,
        )
        console.print("The first example; each token in brackets is learned:", highlight=False)
        console.print(marked_text(each.examples[0].view, tokenizer), markup=False, highlight=False)


def _on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on one of the processes: all of them must save, and stop, after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())
