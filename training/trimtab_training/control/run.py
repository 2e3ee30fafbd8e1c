"""A training from its recipe to its pack."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control import models
from trimtab_training.control.data import Data, complete_data, read_data
from trimtab_training.control.examples import ExampleEncoder, View, marked_text
from trimtab_training.control.generate import Generate, Prompt, greedy_answers, kept_answers
from trimtab_training.control.log import RunLog, require_trackers
from trimtab_training.control.pack_writer import RECIPE_FILE, training_facts, write_pack
from trimtab_training.control.recipe import TrainRecipe
from trimtab_training.control.reference import LiveTemplate, Reference
from trimtab_training.control.signals import collected_signals
from trimtab_training.control.template_cache import CachedTemplate, model_fingerprint
from trimtab_training.control.trainer import Step, Trainer, TrainingError, checkpoints, views_of

_IRRELEVANT = {
    *("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "run_name", "use_cpu"),
    *("resume_from_checkpoint", "overwrite_output_dir", "name", "description"),
}
"""Keys that may differ between a run and the one that goes on from its checkpoint."""


_CACHE_PLACE: dict[str, Any] = {"template": {"cache_dir"}}


class InterruptedRunError(RuntimeError):
    """A signal ended the training; the message says how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Models:
    """Template and control, of one vocabulary."""

    template: PreTrainedModel
    control: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """The template's, if something of it is kept on disk."""

    @property
    def logits(self) -> int:
        return models.shared_logits(self.template, self.control, self.tokenizer)


def train(recipe: TrainRecipe, command: str, console: Console) -> list[float]:
    """Train what a recipe says, and write its pack into `output_dir`.

    Args:
        recipe: what to train.
        command: what was typed, for the model card.
        console: where progress is shown.

    Returns:
        The loss of every step, in nats.

    Raises:
        DataError, TrainingError: something can't be trained on or with.
        InterruptedRunError: a signal came; there is a checkpoint.
    """
    require_trackers(recipe)
    accelerator = Accelerator(
        cpu=recipe.use_cpu,
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.trackers or None,
        project_dir=recipe.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_main_process:
        _require_output_dir(recipe)
    accelerator.wait_for_everyone()
    quiet = console if accelerator.is_main_process else Console(quiet=True)
    tokenizer = _tokenizer(recipe)
    encoder = ExampleEncoder(tokenizer, recipe.max_length)
    readings = read_data(recipe, encoder)
    loaded = _load_models(recipe, tokenizer, accelerator)
    with accelerator.main_process_first():
        data = complete_data(recipe, readings, encoder, _generation(recipe, loaded))
    _tell_data(data, tokenizer, quiet)
    trainer = _trainer(recipe, accelerator, loaded, data, quiet)
    del loaded  # with a cache, the template leaves the memory
    log = RunLog(recipe, accelerator, trainer.total_steps, quiet)
    identity = run_identity(recipe, data, accelerator.num_processes)
    _resume(recipe, trainer, identity)
    if accelerator.is_main_process:
        _write_recipe(recipe)
        log.go_on(trainer.done)
    with log:
        _loop(recipe, trainer, log, accelerator, identity)
    model, weights = trainer.trained()
    if accelerator.is_main_process:
        facts = training_facts(
            recipe,
            data.facts,
            log.lines,
            command=command,
            parameters=model.num_parameters(),
            seconds=log.seconds,
        )
        write_pack(recipe, model, weights, tokenizer, facts)
    return [line["loss"] for line in log.lines]


def _tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerBase:
    """The template's tokenizer, and a check that the control has the same vocabulary."""
    template, control = recipe.template, recipe.control
    tokenizer = models.read_tokenizer(template.model_name_or_path, template.revision, recipe.chat_template)
    source = control.tokenizer_name or control.model_name_or_path
    if source is not None:
        other = models.read_tokenizer(source, control.revision, None)
        models.require_same_vocabulary(template.model_name_or_path, tokenizer, source, other)
    return tokenizer


def _load_models(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Models:
    template = models.load_template(recipe.template)
    control = models.make_control(recipe.control, tokenizer, models.logits_of(template), recipe.seed)
    fingerprint = model_fingerprint(template) if _keeps_something(recipe) else ""
    return Models(template.to(accelerator.device), control, tokenizer, fingerprint)


def _keeps_something(recipe: TrainRecipe) -> bool:
    """Whether something of the template is kept on disk."""
    generates = any(data_set.answers == "generate" for data_set in recipe.datasets)
    return generates or recipe.template.cache != "none"


def _generation(recipe: TrainRecipe, loaded: Models) -> Generate:
    """Greedy generation by the template, whose answers are kept on disk."""

    def generate(prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        pad_id = models.pad_token(loaded.tokenizer)
        return greedy_answers(loaded.template, prompts, max_new_tokens, pad_id)

    return kept_answers(recipe.template.cache_dir.expanduser(), loaded.fingerprint, generate)


def _trainer(
    recipe: TrainRecipe, accelerator: Accelerator, loaded: Models, data: Data, console: Console
) -> Trainer:
    pad_id, logits = models.pad_token(loaded.tokenizer), loaded.logits
    live = LiveTemplate(loaded.template, pad_id, accelerator.device, logits)
    reference: Reference = live
    if recipe.template.cache != "none":
        cache = CachedTemplate(
            recipe.template.cache_dir.expanduser(),
            fingerprint=loaded.fingerprint,
            vocabulary=logits,
            top_k=recipe.template.top_k if recipe.template.cache == "top_k" else None,
            device=accelerator.device,
        )
        with accelerator.main_process_first():
            _fill(cache, live, views_of(data.sets), console)
        reference = cache
    return Trainer(
        accelerator,
        loaded.control,
        reference,
        data.sets,
        recipe,
        pad_id=pad_id,
        vocabulary=logits,
    )


def _fill(cache: CachedTemplate, live: LiveTemplate, views: Sequence[View], console: Console) -> None:
    """Compute what the cache lacks, and say what it holds."""
    start = time.monotonic()
    with Progress(console=console) as progress:
        bar = progress.add_task("template")

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        computed = cache.fill(live, views, show)
    held = f"{cache.file_bytes / 1e6:.1f} MB"
    kept = f", {cache.kept_mass:.4%} of the probability kept exactly" if cache.kept_mass is not None else ""
    console.print(
        f"The template's log-probabilities: {held} on disk{kept}; {computed} shards computed in"
        f" {time.monotonic() - start:.1f} s",
        highlight=False,
    )


def _require_output_dir(recipe: TrainRecipe) -> None:
    """Make the output directory, empty unless the run goes on in it.

    Raises:
        TrainingError: there is something in it, and the recipe does not say what to do with it.
    """
    directory = recipe.output_dir
    if directory.is_dir() and any(directory.iterdir()) and not recipe.resume_from_checkpoint:
        if not recipe.overwrite_output_dir:
            raise TrainingError(
                f"`output_dir` {directory} is not empty. Set `resume_from_checkpoint: true` to go on"
                " from its last"
                " checkpoint, `overwrite_output_dir: true` to delete it, or name another directory"
            )
        if not (directory / RECIPE_FILE).is_file() or Path.cwd().is_relative_to(directory.resolve()):
            raise TrainingError(
                f"`output_dir` {directory} is not empty and is not the directory of a training alone, so it"
                " is not overwritten. Name another directory"
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def _write_recipe(recipe: TrainRecipe) -> None:
    data = recipe.model_dump(mode="json", exclude_unset=True)
    (recipe.output_dir / RECIPE_FILE).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def run_identity(recipe: TrainRecipe, data: Data, processes: int) -> str:
    """Return the sha256 of what a run is made from: recipe, data, and the number of processes."""
    keys = recipe.model_dump(mode="json", exclude=dict.fromkeys(_IRRELEVANT, True) | _CACHE_PLACE)
    facts = [asdict(each) for each in data.facts]
    return hashlib.sha256(json.dumps([keys, facts, processes], sort_keys=True).encode()).hexdigest()


def _resume(recipe: TrainRecipe, trainer: Trainer, identity: str) -> None:
    if recipe.resume_from_checkpoint is True:
        found = checkpoints(recipe.output_dir)
        if not found:
            raise TrainingError(f"`resume_from_checkpoint`: {recipe.output_dir} has no checkpoint")
        trainer.load(found[-1], identity)
    elif recipe.resume_from_checkpoint:
        trainer.load(recipe.resume_from_checkpoint, identity)


def _tell_data(data: Data, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    for each, facts in zip(data.sets, data.facts, strict=True):
        cut = f", {facts.shortened} cut at `max_length`" if facts.shortened else ""
        console.print(
            f"{facts.name}: {facts.objective}, {facts.records} records, {facts.answer_tokens} answer"
            f" tokens{cut}",
            highlight=False,
        )
        console.print("The first example; each token in brackets is learned:", highlight=False)
        console.print(marked_text(each.examples[0].view, tokenizer), markup=False, highlight=False)


def _on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on one of the processes: all of them must save, and stop, after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


def _loop(
    recipe: TrainRecipe, trainer: Trainer, log: RunLog, accelerator: Accelerator, identity: str
) -> None:
    """Run the steps, with checkpoints between them and one at a signal."""
    with collected_signals() as received:

        def on_step(step: Step) -> bool:
            if accelerator.is_main_process:
                log.add(step)
            stops = _on_any_process(accelerator, bool(received))
            if stops or step.step % recipe.save_steps == 0:
                trainer.save(recipe.output_dir, identity)
            return not stops

        trainer.run(on_step)
    if trainer.done < trainer.total_steps:
        raise InterruptedRunError(
            received[0] if received else signal.SIGTERM,
            f"Stopped after step {trainer.done} of {trainer.total_steps}. To go on, repeat the command with"
            " `--resume_from_checkpoint true`",
        )
