"""The optimizer of a recipe and its learning rate schedule."""

from __future__ import annotations

import math

from torch.nn import Module
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from trimtab_training.control.errors import TrainingError
from trimtab_training.control.recipe import TrainRecipe


def make_optimizer(model: Module, recipe: TrainRecipe) -> AdamW:
    return AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )


def make_schedule(optimizer: AdamW, recipe: TrainRecipe, total_steps: int) -> LRScheduler:
    """Make the schedule that `lr_scheduler_type` names.

    Raises:
        TrainingError: the schedule does not take `lr_scheduler_kwargs`.
    """
    try:
        schedule: LRScheduler = get_scheduler(
            recipe.lr_scheduler_type,
            optimizer,
            num_warmup_steps=recipe.warmup_steps or math.ceil(total_steps * recipe.warmup_ratio),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=recipe.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise TrainingError(
            f"`lr_scheduler_kwargs` must fit `lr_scheduler_type: {recipe.lr_scheduler_type}`,"
            f" got {recipe.lr_scheduler_kwargs}: {error}"
        ) from error
    return schedule
