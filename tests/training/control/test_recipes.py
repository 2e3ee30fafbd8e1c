"""The recipes that come with the package."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tiny
from trimtab_server.cli import app
from trimtab_training.control.data import read_data
from trimtab_training.control.examples import ExampleEncoder, View
from trimtab_training.control.formats import HUB_PREFIX, Record
from trimtab_training.control.pair_recipe import PairRecipe, read_train_recipe
from trimtab_training.control.recipe import ControlRecipe
from trimtab_training.control.recipes_cli import RECIPES, recipe_names
from trimtab_training.evaluation.questions import load_group
from trimtab_training.evaluation.recipe import EvalRecipe
from trimtab_training.recipe_file import read_recipe

EVALUATED = sorted(path.parent.name for path in RECIPES.glob("*/evaluation.yaml"))


def read(name: str) -> ControlRecipe:
    return read_recipe(ControlRecipe, RECIPES / name / "recipe.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_can_be_read(name):
    assert read_train_recipe(RECIPES / name / "recipe.yaml").description


def test_the_list_says_what_each_one_does():
    result = CliRunner().invoke(app, ["recipes", "list"])
    lines = dict(line.split("  ", 1) for line in result.output.splitlines())
    assert [name.strip() for name in lines] == recipe_names()
    assert all(said.strip().endswith(".") for said in lines.values())


def test_a_recipe_is_copied_with_its_data(tmp_path):
    result = CliRunner().invoke(app, ["recipes", "copy", "capitals", str(tmp_path / "mine")])
    assert result.exit_code == 0
    assert "trimtab train recipe.yaml" in result.output
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"recipe.yaml", "european_capitals.jsonl", "general.jsonl"} <= names


def test_a_recipe_that_is_unknown_or_would_overwrite_something_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["recipes", "copy", "capital", str(tmp_path / "mine")])
    assert (result.exit_code, "Available: alpaca-110m" in result.output) == (2, True)
    result = CliRunner().invoke(app, ["recipes", "copy", "capitals", str(tmp_path)])
    assert (result.exit_code, "exists. Name a new directory" in result.output) == (2, True)


def test_the_data_of_capitals_are_whole_and_no_question_is_in_two_sets(monkeypatch):
    monkeypatch.chdir(RECIPES / "capitals")
    tokenizer = tiny.byte_level(400)
    readings = read_data(read("capitals").datasets, ExampleEncoder(tokenizer, 256))
    assert [reading.records for reading in readings] == [600, 624, 354]
    prompts = [example.view.ids[: example.view.positions[0]] for example in readings[0].examples]
    prompts += [question.prompt for reading in readings for question in reading.questions]
    assert len(set(prompts)) == 600 + 624 + 354


@pytest.mark.parametrize("name", EVALUATED)
def test_what_is_asked_was_not_trained(name, monkeypatch):
    """At least 40 questions of what changes, and none of them in the data of the training."""
    monkeypatch.chdir(RECIPES / name)
    paths = [path for data_set in read(name).datasets for path in data_set.paths]
    lines = [line for path in paths for line in (RECIPES / name / path).read_text().splitlines()]
    trained = {json.loads(line)["instruction"] for line in lines}
    recipe = read_recipe(EvalRecipe, RECIPES / name / "evaluation.yaml")
    groups = [load_group(group) for group in recipe.groups]
    assert len(groups[0].questions) >= 40
    assert all(question.answer for group in groups for question in group.questions)
    assert not trained & {question.text for group in groups for question in group.questions}


def view_of(recipe: ControlRecipe) -> tuple[str, str]:
    """What is read and what is learned of a question, in the recipe's own chat template."""
    tokenizer = tiny.byte_level(400)
    tokenizer.chat_template = recipe.chat_template
    messages = ({"role": "user", "content": "Bada?"}, {"role": "assistant", "content": "Cefi."})
    view: View
    (view,) = ExampleEncoder(tokenizer, 100).views(Record("r", messages))
    return tokenizer.decode(view.ids), tokenizer.decode(view.targets)


def test_the_papers_prompts_are_theirs():
    assert view_of(read("alpaca-15m")) == ("<s><|user|>\nBada?\n<|assistant|>\nCefi.</s>", "Cefi.</s>")
    assert view_of(read("tofu-grad-diff")) == ("<s>[INST] Bada? [/INST]Cefi.</s>", "Cefi.</s>")


def test_the_papers_steps_are_theirs():
    """TOFU: 400 records, 16 a step, 20 times."""
    tofu, alpaca = read("tofu-grad-diff"), read("alpaca-15m")
    assert tofu.datasets[0].bound is None
    assert all(path.startswith(HUB_PREFIX) for data_set in tofu.datasets for path in data_set.paths)
    assert (
        400 * tofu.num_train_epochs / (tofu.per_device_train_batch_size * tofu.gradient_accumulation_steps)
        == 500
    )
    assert alpaca.per_device_train_batch_size * alpaca.gradient_accumulation_steps == 64


def test_the_pairs_halves_differ_by_what_is_forgotten():
    """The model with weight -1 has learned it, in the prompts of the other recipes for TOFU."""
    recipe, control = read_train_recipe(RECIPES / "tofu-pair" / "recipe.yaml"), read("tofu-grad-diff")
    assert isinstance(recipe, PairRecipe)
    paths = {half: recipe.members[half].datasets[0].paths for half in ("plus", "minus")}
    assert set(paths["minus"]) - set(paths["plus"]) == set(control.datasets[0].paths)
    assert set(paths["plus"]) == set(control.datasets[1].paths)
    assert recipe.chat_template == control.chat_template
