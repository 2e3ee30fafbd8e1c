"""Trains a small control by the trainer of `trimtab train`, on data sets that are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control import models
from trimtab_training.control.recipe import Architecture, ControlModel, TrainRecipe
from trimtab_training.control.reference import LiveTemplate
from trimtab_training.control.trainer import Step, Trainer, TrainingSet
from trimtab_training.control.training_run import make_accelerator
from trimtab_training.world.architectures import HEAD, INITIALIZER_RANGE
from trimtab_training.world.settings import ControlSettings
from trimtab_training.world.vocabularies import MAX_LENGTH

Progress = Callable[[int, int], None]
"""Called with the number of steps that are done, and of all."""


class ControlInMemory(TrainRecipe):
    """A recipe without data files: the trainer gets the examples themselves."""

    strength: tuple[float, float]
    shift_penalty: float

    @property
    def strengths(self) -> tuple[float, float]:
        return self.strength

    @property
    def penalty(self) -> float:
        return self.shift_penalty


def control_recipe(
    settings: ControlSettings, *, width: int, layers: int, seed: int, output_dir: Path
) -> ControlInMemory:
    """The recipe of a fresh Llama whose heads are `HEAD` wide.

    Args:
        settings: how it is trained.
        width: its hidden size.
        layers: their number.
        seed: fresh weights and the order of the examples come from it.
        output_dir: where the control is to be saved.
    """
    architecture = Architecture(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
    )
    return ControlInMemory(
        control=ControlModel(config=architecture),
        output_dir=output_dir,
        strength=settings.strengths,
        shift_penalty=settings.shift_penalty,
        learning_rate=settings.learning_rate,
        max_steps=settings.steps,
        max_grad_norm=settings.clip,
        seed=seed,
        use_cpu=True,
    )


def train_control(
    recipe: ControlInMemory,
    template: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[TrainingSet],
    progress: Progress = lambda _done, _steps: None,
) -> tuple[PreTrainedModel, list[float]]:
    """Train a control beside `template`.

    Returns:
        The control, and the loss of each step in nats.
    """
    accelerator = make_accelerator(recipe, recipe.output_dir)
    logits, pad_id = models.logits_of(template), models.pad_token(tokenizer)
    trainer = Trainer(
        accelerator,
        models.make_control(recipe.control, tokenizer, logits, recipe.seed),
        LiveTemplate(template, pad_id, accelerator.device, logits),
        sets,
        recipe,
        pad_id=pad_id,
        vocabulary=logits,
    )
    losses: list[float] = []

    def on_step(step: Step) -> bool:
        losses.append(step.loss)
        progress(step.step, trainer.total_steps)
        return True

    trainer.run(on_step)
    return trainer.trained()[0], losses
