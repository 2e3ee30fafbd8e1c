"""The small world's control, trained by the trainer of `trimtab train`."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from trimtab_training.control import models
from trimtab_training.control.examples import Example, answered
from trimtab_training.control.objectives import Objective, cross_entropy, divergence
from trimtab_training.control.reference import answer_logits
from trimtab_training.control.trainer import TrainingSet
from trimtab_training.world.settings import ControlSettings
from trimtab_training.world.teaching import control_recipe, train_control

CPU = torch.device("cpu")
VIEWS = [answered((1, 2, i), (3 + i, 4)) for i in range(5, 9)]
TOLD, LEFT = ([Example(view) for view in some] for some in (VIEWS[:2], VIEWS[2:]))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level(300)


@pytest.fixture
def template(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama(len(tokenizer), width=128, layers=1)).eval()


@pytest.fixture
def recipe(tmp_path):
    def make(**settings):
        return control_recipe(
            ControlSettings(**settings), width=64, layers=1, seed=1, output_dir=tmp_path / "control"
        )

    return make


def test_an_untrained_control_shifts_nothing(recipe, tokenizer):
    """Training starts from the template's own distribution."""
    made = recipe()
    control = models.make_control(made.control, tokenizer, len(tokenizer), made.seed)
    assert not answer_logits(control, VIEWS, 0, CPU).any()


def test_what_is_retained_stays_while_something_else_is_learned(recipe, template, tokenizer):
    """Prompts of the two sets differ in one token."""
    sets = [
        TrainingSet("told", TOLD, Objective(cross_entropy), 0.5, 4),
        TrainingSet("left", LEFT, Objective(divergence), 0.5, 4),
    ]
    control, losses = train_control(recipe(steps=100), template, tokenizer, sets)
    assert losses[0] > 1
    assert losses[-1] < 0.3
    own, shift = (answer_logits(model, VIEWS, 0, CPU) for model in (template, control))
    choices = (own + shift).argmax(dim=1).tolist()
    assert choices[:4] == [token for view in VIEWS[:2] for token in view.targets]
    assert choices[4:] == own[4:].argmax(dim=1).tolist()


def test_the_same_seed_trains_the_same_control(recipe, template, tokenizer):
    """Its fresh weights, the order of the examples and the strengths included."""
    told: list[tuple[int, int]] = []
    sets = [TrainingSet("told", TOLD + LEFT, Objective(cross_entropy), 1.0, 2)]
    _, losses = train_control(recipe(steps=3), template, tokenizer, sets)
    _, again = train_control(recipe(steps=3), template, tokenizer, sets, lambda *steps: told.append(steps))
    assert losses == again
    assert told == [(1, 3), (2, 3), (3, 3)]
