"""A training from its recipe to its pack."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control import models
from trimtab_training.control.data import Data, complete_data, read_data
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.examples import ExampleEncoder, View
from trimtab_training.control.generate import Generate, Prompt, greedy_answers, kept_answers
from trimtab_training.control.log import RunLog, require_trackers
from trimtab_training.control.pack_writer import outcome, training_facts, write_pack
from trimtab_training.control.recipe import ControlRecipe
from trimtab_training.control.reference import LiveTemplate, Reference
from trimtab_training.control.teacher_server import kept_teaching
from trimtab_training.control.template_cache import CachedTemplate, model_fingerprint
from trimtab_training.control.trainer import Trainer, checkpoints, views_of
from trimtab_training.control.training_run import (
    IRRELEVANT,
    TrainingRun,
    make_accelerator,
    require_output_dir,
    run_identity,
    tell_data,
    write_recipe,
)

_CACHE_PLACE: dict[str, Any] = {"template": {"cache_dir"}}


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


def train(recipe: ControlRecipe, command: str, console: Console) -> list[float]:
    """Train what a recipe says, and write its pack into `output_dir`.

    Args:
        recipe: what to train.
        command: what was typed, for the model card.
        console: where progress is shown.

    Returns:
        The loss of every step that is logged, in nats.

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
    tokenizer = _tokenizer(recipe)
    encoder = ExampleEncoder(tokenizer, recipe.max_length)
    readings = read_data(recipe.datasets, encoder)
    loaded = _load_models(recipe, tokenizer, accelerator)
    with accelerator.main_process_first():
        data = complete_data(
            recipe, readings, encoder, _generation(recipe, loaded), kept_teaching(_cache_dir(recipe))
        )
    tell_data(data, tokenizer, quiet)
    trainer = _trainer(recipe, accelerator, loaded, data, quiet)
    del loaded  # with a cache, the template leaves the memory
    log = RunLog(recipe, accelerator, trainer.total_steps, quiet)
    identity = _identity(recipe, data, accelerator.num_processes)
    training = TrainingRun(recipe, recipe.output_dir, accelerator, trainer, log, identity)
    training.resume(_checkpoint(recipe))
    if accelerator.is_main_process:
        write_recipe(recipe)
    received = training.run()
    if received and trainer.done < trainer.total_steps:
        raise training.interrupted(received)
    model, weights = trainer.trained()
    if accelerator.is_main_process:
        made = outcome(data.facts, log.lines, trainer.done, log.seconds)
        facts = training_facts(recipe, made, command=command, parameters=model.num_parameters())
        write_pack(recipe, model, weights, tokenizer, facts)
    return [line["loss"] for line in log.lines]


def _tokenizer(recipe: ControlRecipe) -> PreTrainedTokenizerBase:
    """The template's tokenizer, and a check that the control has the same vocabulary."""
    template, control = recipe.template, recipe.control
    tokenizer = models.read_tokenizer(template.model_name_or_path, template.revision, recipe.chat_template)
    source = control.tokenizer_name or control.model_name_or_path
    if source is not None:
        other = models.read_tokenizer(source, control.revision, None)
        models.require_same_vocabulary(template.model_name_or_path, tokenizer, source, other)
    return tokenizer


def _load_models(
    recipe: ControlRecipe, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Models:
    template = models.load_template(recipe.template)
    control = models.make_control(recipe.control, tokenizer, models.logits_of(template), recipe.seed)
    fingerprint = model_fingerprint(template) if _keeps_something(recipe) else ""
    return Models(template.to(accelerator.device), control, tokenizer, fingerprint)


def _keeps_something(recipe: ControlRecipe) -> bool:
    """Whether something of the template is kept on disk."""
    generates = any(each.answers == "generate" and each.server is None for each in recipe.datasets)
    return generates or recipe.template.cache != "none"


def _generation(recipe: ControlRecipe, loaded: Models) -> Generate:
    """Greedy generation by the template, whose answers are kept on disk."""

    def generate(prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        pad_id = models.pad_token(loaded.tokenizer)
        return greedy_answers(loaded.template, prompts, max_new_tokens, pad_id)

    return kept_answers(_cache_dir(recipe), loaded.fingerprint, generate)


def _cache_dir(recipe: ControlRecipe) -> Path:
    return recipe.template.cache_dir.expanduser()


def _trainer(
    recipe: ControlRecipe, accelerator: Accelerator, loaded: Models, data: Data, console: Console
) -> Trainer:
    pad_id, logits = models.pad_token(loaded.tokenizer), loaded.logits
    live = LiveTemplate(loaded.template, pad_id, accelerator.device, logits)
    reference: Reference = live
    if recipe.template.cache != "none":
        cache = CachedTemplate(
            _cache_dir(recipe),
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


def _identity(recipe: ControlRecipe, data: Data, processes: int) -> str:
    keys = recipe.model_dump(mode="json", exclude=dict.fromkeys(IRRELEVANT, True) | _CACHE_PLACE)
    return run_identity(keys, data.facts, processes)


def _checkpoint(recipe: ControlRecipe) -> Path | None:
    """The checkpoint to continue from."""
    if recipe.resume_from_checkpoint is True:
        found = checkpoints(recipe.output_dir)
        if not found:
            raise TrainingError(f"`resume_from_checkpoint`: {recipe.output_dir} has no checkpoint")
        return found[-1]
    return recipe.resume_from_checkpoint or None
