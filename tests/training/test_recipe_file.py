"""Recipes are read from a file and from options, and their faults are told by key."""

from __future__ import annotations

import pytest
from pydantic import Field

from trimtab_training.recipe_file import RecipeError, Section, read_recipe


class Model(Section):
    path: str = "here"
    device: str = "auto"


class Data(Section):
    path: str
    weight: float = Field(default=1.0, gt=0)


class Recipe(Section):
    learning_rate: float = 0.1
    model: Model = Model()
    data: tuple[Data, ...] | str = ()


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def test_options_replace_keys_of_the_file(write):
    path = write("learning_rate: 0.5\nmodel: {path: x}\ndata: [{path: a}, {path: b}]\n")
    recipe = read_recipe(
        Recipe, path, ["--model.device", "cpu", "--data.1.weight=2", "--learning_rate", "1.0e-3"]
    )
    assert recipe.model == Model(path="x", device="cpu")
    assert [data.weight for data in recipe.data] == [1, 2]
    assert recipe.learning_rate == 0.001


def test_everything_can_be_an_option():
    recipe = read_recipe(Recipe, None, ["--data", "[{path: a}]", "--model.path", "y"])
    assert (recipe.data, recipe.model.path) == ((Data(path="a"),), "y")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("learnin_rate: 1", [], "`learnin_rate` is not a key of a recipe. Did you mean `learning_rate`?"),
        ("model: {devise: cpu}", [], "`model.devise` is not a key of a recipe. Did you mean `device`?"),
        ("zzz: 1", [], "`zzz` is not a key of a recipe. Available keys: data, learning_rate, model"),
        ("data: [{path: a, weigth: 1}]", [], "Did you mean `weight`?"),
        ("data: [{weight: 1}]", [], "path` is missing"),
        ("learning_rate: fast", [], "`learning_rate`: Input should be a valid number"),
        ("learning_rate: fast", [], "got 'fast'"),
        ("[1, 2]", [], "must hold keys and values, got [1, 2]"),
        ("a: [", [], "is not valid YAML"),
        ("", [], "must hold keys and values, got None"),
        ("{}", ["stray"], "An option begins with `--`, got 'stray'. Write `--key value`"),
        ("{}", ["--learning_rate"], "`--learning_rate` needs a value. Write `--learning_rate value`"),
        ("{}", ["--model", "{"], "`--model` must be YAML, got '{'"),
        ("data: [{path: a}]", ["--data.1.weight", "2"], "`--data.1.weight` leads nowhere"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(write, text, arguments, message):
    with pytest.raises(RecipeError) as caught:
        read_recipe(Recipe, write(text), arguments)
    assert message in str(caught.value)


def test_all_faults_are_told_at_once(write):
    with pytest.raises(RecipeError) as caught:
        read_recipe(Recipe, write("learnin_rate: 1\nmodel: 3"), [])
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml can't be read"):
        read_recipe(Recipe, tmp_path / "none.yaml", [])
