"""The cost that a control saves: trains a LoRA of a target on the data of a control's recipe.

The target learns the same answers, and to keep its own ones to the questions that the control retains. Unlike
the control's training this needs the target itself, and is repeated for every target.

`python benchmarks/lora.py recipe.yaml DIRECTORY --template.model_name_or_path=TARGET`; other keys of the
recipe may follow in the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from trimtab_training.control import models
from trimtab_training.control.data import Data, complete_data, read_data
from trimtab_training.control.examples import Example, ExampleEncoder
from trimtab_training.control.generate import greedy_answers
from trimtab_training.control.plan import Plan
from trimtab_training.control.recipe import ControlRecipe
from trimtab_training.control.reference import answer_logits
from trimtab_training.recipe_file import read_recipe

RANK = 8
LEARNING_RATE = 1e-3
FACTS_FILE = "lora.json"


def train_lora(recipe: ControlRecipe, directory: Path, *, steps: int, smaller: int) -> None:
    """Train a LoRA of the recipe's template, which is the target here, and save the merged model.

    Args:
        recipe: its data sets and seed are used, and its template and chat template name the target.
        directory: where the model is saved, with the training's seconds in `lora.json`.
        steps: of the optimizer.
        smaller: a step takes each data set's batch size, divided by this.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = models.read_tokenizer(recipe.template.model_name_or_path, None, recipe.chat_template)
    model = models.load_template(recipe.template)
    pad = models.pad_token(tokenizer)
    encoder = ExampleEncoder(tokenizer, recipe.max_length)
    started = time.monotonic()
    data = complete_data(
        recipe,
        read_data(recipe.datasets, encoder),
        encoder,
        lambda prompts, count: greedy_answers(model, prompts, count, pad),
    )
    answered = time.monotonic()
    adapted: Any = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    sizes = [max(1, each.batch_size // smaller) for each in data.sets]
    plan = Plan([len(each.examples) for each in data.sets], sizes, recipe.seed)
    losses = _train(adapted, data, pad, plan, steps)
    trained = time.monotonic()
    adapted.merge_and_unload().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts = {
        "steps": steps,
        "examples a step": sizes,
        "trained parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "loss": [round(loss, 4) for loss in losses],
        "seconds of answers": round(answered - started, 1),
        "seconds": round(trained - answered, 1),
    }
    (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _train(model: PreTrainedModel, data: Data, pad: int, plan: Plan, steps: int) -> list[float]:
    """The cross entropy of each step, in nats a token."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    model.train()
    losses = []
    for step in range(steps):
        examples = [
            each.examples[place]
            for number, each in enumerate(data.sets)
            for place in plan.records(number, step)
        ]
        loss = _loss(model, examples, pad)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def _loss(model: PreTrainedModel, examples: Sequence[Example], pad: int) -> Tensor:
    views = [example.view for example in examples]
    logits = answer_logits(model, views, pad, torch.device(model.device))
    targets = [token for view in views for token in view.targets]
    return cross_entropy(logits, torch.tensor(targets, device=logits.device))


def main(
    context: typer.Context,
    recipe: Path,
    directory: Path,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 60,
    smaller: Annotated[int, typer.Option(help="By how much to divide the recipe's batch sizes.")] = 2,
) -> None:
    """Train, and save the merged model."""
    made = read_recipe(ControlRecipe, recipe, list(context.args))
    train_lora(made, directory, steps=steps, smaller=smaller)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
