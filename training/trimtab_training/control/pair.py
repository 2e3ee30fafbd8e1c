"""Trains the two models of a pair, each alone, and writes them as one pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control import models
from trimtab_training.control.data import Data, complete_data, read_data
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.examples import ExampleEncoder
from trimtab_training.control.log import RunLog, require_trackers
from trimtab_training.control.pack_writer import outcome, save_model
from trimtab_training.control.pair_recipe import PairRecipe
from trimtab_training.control.pair_writer import pair_facts, write_manifest
from trimtab_training.control.reference import NoTemplate
from trimtab_training.control.trainer import Trainer, checkpoints
from trimtab_training.control.training_run import (
    IRRELEVANT,
    TrainingRun,
    make_accelerator,
    require_output_dir,
    run_identity,
    tell_data,
    write_recipe,
)

_OTHER_KEYS = IRRELEVANT | {"plus", "minus", "strength"}
"""Keys that one model's training does not depend on; its own section is added."""


@dataclass(frozen=True)
class _Pair:
    """The recipe, tokenizer and data of both trainings.

    data: of each model that is trained, by its name.
    """

    recipe: PairRecipe
    tokenizer: PreTrainedTokenizerBase
    data: Mapping[str, Data]
    console: Console

    def make_model(self) -> PreTrainedModel:
        """The model before the training: the same weights at each call."""
        recipe, tokens = self.recipe, models.token_count(self.tokenizer)
        model = models.make_control(recipe.control, self.tokenizer, tokens, recipe.seed)
        models.require_enough_logits(model, self.tokenizer)
        return model

    def identity(self, part: str, processes: int) -> str:
        keys = self.recipe.model_dump(mode="json", exclude=dict.fromkeys(_OTHER_KEYS, True))
        section = self.recipe.members[part].model_dump(mode="json")
        return run_identity(keys | {part: section}, self.data[part].facts, processes)


@dataclass(frozen=True)
class _Trained:
    """One trained model: its entry in the manifest, and the losses of its steps."""

    facts: dict[str, Any]
    losses: list[float]


def train_pair(recipe: PairRecipe, command: str, console: Console) -> dict[str, list[float]]:
    """Train the models of a pair one after the other, and write their pack into `output_dir`.

    Args:
        recipe: what to train.
        command: what was typed, for the model card.
        console: where progress is shown.

    Returns:
        The losses of the logged steps in nats, for each model that is trained: `plus`, `minus`.

    Raises:
        DataError, TrainingError: something can't be trained on or with.
        InterruptedRunError: a signal came; there is a checkpoint.
    """
    require_trackers(recipe)
    accelerator = make_accelerator(recipe, recipe.output_dir)
    if accelerator.is_main_process:
        require_output_dir(recipe)
    accelerator.wait_for_everyone()
    quiet = console if accelerator.is_main_process else Console(quiet=True)
    pair = _read(recipe, quiet)
    _require_checkpoint(recipe)
    if accelerator.is_main_process:
        write_recipe(recipe)
    trained = {part: _train(pair, part) for part in recipe.members}
    if accelerator.is_main_process:
        if recipe.minus is None:
            _save_untrained(pair)
        write_manifest(
            recipe, pair_facts(recipe, {part: each.facts for part, each in trained.items()}, command)
        )
    return {part: each.losses for part, each in trained.items()}


def _read(recipe: PairRecipe, console: Console) -> _Pair:
    """Read the tokenizer and all data, and show them, before anything is trained."""
    tokenizer = models.read_tokenizer(recipe.tokenizer_source, recipe.control.revision, recipe.chat_template)
    data = {}
    for part, member in recipe.members.items():
        encoder = ExampleEncoder(tokenizer, recipe.max_length)
        data[part] = complete_data(recipe, read_data(member.datasets, encoder), encoder)
    for part, read in data.items():
        console.print(f"`{part}` is trained on:", highlight=False)
        tell_data(read, tokenizer, console)
    return _Pair(recipe, tokenizer, data, console)


def _require_checkpoint(recipe: PairRecipe) -> None:
    found = any(checkpoints(recipe.output_dir / part) for part in recipe.members)
    if recipe.resume_from_checkpoint and not found:
        raise TrainingError(f"`resume_from_checkpoint`: {recipe.output_dir} has no checkpoint of a pair")


def _train(pair: _Pair, part: str) -> _Trained:
    """Train a model, or continue it from its last checkpoint, and save it.

    A checkpoint after its last step keeps it while the other model is trained.
    """
    recipe, directory = pair.recipe, pair.recipe.output_dir / part
    directory.mkdir(exist_ok=True)
    model = pair.make_model()
    accelerator = make_accelerator(recipe, directory)
    logits = models.logits_of(model)
    trainer = Trainer(
        accelerator,
        model,
        NoTemplate(accelerator.device, logits),
        pair.data[part].sets,
        recipe,
        pad_id=models.pad_token(pair.tokenizer),
        vocabulary=logits,
    )
    log = RunLog(recipe, accelerator, trainer.total_steps, pair.console, part)
    identity = pair.identity(part, accelerator.num_processes)
    run = TrainingRun(recipe, directory, accelerator, trainer, log, identity)
    run.resume(_checkpoint(recipe, directory))
    received = run.run(keeps_last=True)
    if received and (trainer.done < trainer.total_steps or part != list(recipe.members)[-1]):
        raise run.interrupted(received, f" of `{part}`")
    trained, weights = trainer.trained()
    if accelerator.is_main_process:
        save_model(directory, trained, weights, pair.tokenizer)
    facts = outcome(pair.data[part].facts, log.lines, trainer.done, log.seconds)
    return _Trained(facts | {"parameters": trained.num_parameters()}, [line["loss"] for line in log.lines])


def _checkpoint(recipe: PairRecipe, directory: Path) -> Path | None:
    """The last checkpoint of a model; None: it has to begin."""
    found = checkpoints(directory) if recipe.resume_from_checkpoint else []
    return found[-1] if found else None


def _save_untrained(pair: _Pair) -> None:
    model = pair.make_model()
    save_model(pair.recipe.output_dir / "minus", model, model.state_dict(), pair.tokenizer)
