"""The training loop: the loss is on the sum of template and control; the gradient goes to the control."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from trimtab_training.control.errors import TrainingError
from trimtab_training.control.examples import Example, View
from trimtab_training.control.objectives import Objective, controlled_log_probs
from trimtab_training.control.optimization import make_optimizer, make_schedule
from trimtab_training.control.plan import Plan
from trimtab_training.control.recipe import TrainRecipe
from trimtab_training.control.reference import Reference, answer_logits

_STATE_FILE = "trimtab_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class TrainingSet:
    """Examples under an objective, `batch_size` of which are in a forward pass of one device."""

    name: str
    examples: Sequence[Example]
    objective: Objective
    weight: float
    batch_size: int


@dataclass(frozen=True)
class Step:
    """What is logged of a step. `losses` are means over tokens or answers, in nats; `loss` is the sum."""

    step: int
    epoch: float
    loss: float
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    strength: float
    tokens: int


@dataclass
class _Sums:
    """The parts of a step's loss on this process, each already divided by the step's number of units."""

    losses: list[float]
    penalty: float = 0.0
    tokens: int = field(default=0)


class Trainer:
    """Trains a control in place."""

    def __init__(
        self,
        accelerator: Accelerator,
        control: PreTrainedModel,
        reference: Reference,
        sets: Sequence[TrainingSet],
        recipe: TrainRecipe,
        *,
        pad_id: int,
        vocabulary: int,
    ) -> None:
        """Args:
        accelerator: where and in which precision it runs.
        control: float32 weights.
        reference: the template, or `NoTemplate`.
        sets: what to train on. The first one counts the epochs.
        recipe: how.
        pad_id: the token behind the end of shorter views.
        vocabulary: the number of logits that template and control share; without a template, the control's.
        """
        self._accelerator = accelerator
        self._reference = reference
        self._sets = sets
        self._recipe = recipe
        self._pad_id = pad_id
        self._vocabulary = vocabulary
        self._micro_steps = accelerator.num_processes * recipe.gradient_accumulation_steps
        self._plan = Plan(
            [len(each.examples) for each in sets],
            [each.batch_size * self._micro_steps for each in sets],
            recipe.seed,
        )
        planned = self._plan.steps(recipe.num_train_epochs)
        self.total_steps = recipe.max_steps if recipe.max_steps > 0 else planned
        self.done = 0
        optimizer = make_optimizer(control, recipe)
        schedule = make_schedule(optimizer, recipe, self.total_steps)
        self._control, self._optimizer, self._schedule = accelerator.prepare(control, optimizer, schedule)

    def run(self, on_step: Callable[[Step], bool]) -> None:
        """Train to the end, or until `on_step` returns False; it is called after every step.

        Raises:
            TrainingError: the loss is not finite.
        """
        self._control.train()
        while self.done < self.total_steps:
            step = self._step()
            if not math.isfinite(step.loss):
                raise TrainingError(
                    f"The loss of step {step.step} is {step.loss}. Lower `learning_rate`, or give"
                    " `forget` a `bound`"
                )
            if not on_step(step):
                break
        self._control.eval()

    def _step(self) -> Step:
        recipe, here = self._recipe, self._accelerator.process_index
        strength = self._plan.strength(self.done, *recipe.strengths)
        taken = [self._plan.records(place, self.done) for place in range(len(self._sets))]
        units = [
            each.objective.units([len(each.examples[i].view.positions) for i in places])
            for each, places in zip(self._sets, taken, strict=True)
        ]
        sums = _Sums([0.0] * len(self._sets))
        mine = range(
            here * recipe.gradient_accumulation_steps, (here + 1) * recipe.gradient_accumulation_steps
        )
        for micro in mine:
            part = [
                [each.examples[i] for i in places[micro * each.batch_size : (micro + 1) * each.batch_size]]
                for each, places in zip(self._sets, taken, strict=True)
            ]
            if micro == mine[-1]:
                self._backward(part, units, strength, sums)
            else:
                with self._accelerator.no_sync(self._control):
                    self._backward(part, units, strength, sums)
        grad_norm = self._accelerator.clip_grad_norm_(self._control.parameters(), recipe.max_grad_norm)
        self._require_finite(float(grad_norm), sums)
        rate = self._schedule.get_last_lr()[0]
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.done += 1
        return self._report(sums, rate, float(grad_norm), strength)

    def _require_finite(self, grad_norm: float, sums: _Sums) -> None:
        """Stop before the optimizer spoils the weights. A loss that is not finite has a message of its own,
        and float16 skips such steps.
        """
        is_expected = self._accelerator.mixed_precision == "fp16" or not math.isfinite(sum(sums.losses))
        if not math.isfinite(grad_norm) and not is_expected:
            raise TrainingError(
                f"The gradient of step {self.done + 1} is not finite. Lower `learning_rate`, or use another"
                " `mixed_precision`"
            )

    def _backward(
        self, part: Sequence[Sequence[Example]], units: Sequence[int], strength: float, sums: _Sums
    ) -> None:
        """Add the gradient of a forward pass, as a part of the whole step's loss."""
        views = [example.view for examples in part for example in examples]
        device = self._accelerator.device
        with self._accelerator.autocast():
            shift = answer_logits(self._control, views, self._pad_id, device)[:, : self._vocabulary]
        template = self._reference.log_probs(views)
        controlled = controlled_log_probs(template, shift, strength)
        total = torch.zeros((), device=device)
        start = 0
        for place, (each, examples) in enumerate(zip(self._sets, part, strict=True)):
            lengths = [len(example.view.positions) for example in examples]
            tokens = slice(start, start := start + sum(lengths))
            loss = (
                self._losses(each, examples, controlled[tokens], template[tokens], lengths).sum()
                / units[place]
            )
            sums.losses[place] += loss.item()
            total = total + each.weight * loss
        if self._recipe.penalty:
            penalty = self._recipe.penalty * shift.square().mean() / self._micro_steps
            sums.penalty += penalty.item()
            total = total + penalty
        sums.tokens += start
        # Gradients are averaged over processes, and this loss is a part of a sum over them.
        self._accelerator.backward(total * self._accelerator.num_processes)

    def _losses(
        self,
        each: TrainingSet,
        examples: Sequence[Example],
        controlled: Tensor,
        template: Tensor,
        lengths: Sequence[int],
    ) -> Tensor:
        taught = [example.teacher for example in examples if example.teacher is not None]
        reference = self._reference.log_probs(taught) if taught else template
        if given := [example.taught for example in examples if example.taught is not None]:
            reference = torch.cat([one.dense(self._vocabulary) for one in given]).to(template.device)
        return each.objective.loss(controlled, reference, self._targets(examples), lengths)

    def _targets(self, examples: Sequence[Example]) -> Tensor:
        tokens = [token for example in examples for token in example.view.targets]
        return torch.tensor(tokens, device=self._accelerator.device)

    def _report(self, sums: _Sums, rate: float, grad_norm: float, strength: float) -> Step:
        parts = torch.tensor([*sums.losses, sums.penalty, sums.tokens], dtype=torch.float64)
        *losses, penalty, tokens = self._accelerator.reduce(parts.to(self._accelerator.device)).tolist()
        weighted = sum(each.weight * loss for each, loss in zip(self._sets, losses, strict=True))
        return Step(
            step=self.done,
            epoch=self._plan.epoch(self.done),
            loss=weighted + penalty,
            losses={each.name: loss for each, loss in zip(self._sets, losses, strict=True)},
            learning_rate=rate,
            grad_norm=grad_norm,
            strength=strength,
            tokens=int(tokens),
        )

    def save(self, output_dir: Path, identity: str) -> Path:
        """Write a checkpoint: weights, optimizer, schedule, random states, and the place in the data.

        Args:
            output_dir: where checkpoints are.
            identity: what the run is made from; only a run of the same goes on from the checkpoint.
        """
        directory = output_dir / f"checkpoint-{self.done}"
        self._accelerator.save_state(str(directory))
        self._accelerator.wait_for_everyone()  # its mark says that all of it is there
        if self._accelerator.is_main_process:
            state = json.dumps({"step": self.done, "identity": identity})
            (directory / _STATE_FILE).write_text(state, encoding="utf-8")
            if limit := self._recipe.save_total_limit:
                for old in checkpoints(output_dir)[:-limit]:
                    shutil.rmtree(old)
        return directory

    def load(self, directory: Path, identity: str) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: there is none, or one of another run.
        """
        try:
            state = json.loads((directory / _STATE_FILE).read_bytes())
        except (OSError, json.JSONDecodeError) as error:
            raise TrainingError(f"`resume_from_checkpoint`: {directory} is not a whole checkpoint") from error
        if state["identity"] != identity:
            raise TrainingError(
                f"`resume_from_checkpoint`: {directory} comes from another recipe, other data or another"
                " number of processes. Restore them, or start again with `overwrite_output_dir: true`"
            )
        self._accelerator.load_state(str(directory))
        self.done = state["step"]

    def trained(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """The control, and its weights, gathered from all processes."""
        weights: dict[str, Tensor] = self._accelerator.get_state_dict(self._control)
        model: PreTrainedModel = self._accelerator.unwrap_model(self._control)
        return model, weights


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints in a directory, the oldest first."""
    numbered = {
        int(match[1]): path
        for path in output_dir.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / _STATE_FILE).is_file()
    }
    return [numbered[step] for step in sorted(numbered)]


def logged(step: Step) -> dict[str, float | dict[str, float]]:
    """A step as a line of the log."""
    return asdict(step)


def views_of(sets: Sequence[TrainingSet]) -> list[View]:
    """All views that a reference may be asked for."""
    examples = [example for each in sets for example in each.examples]
    return [view for example in examples for view in (example.view, example.teacher) if view is not None]
