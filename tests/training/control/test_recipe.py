"""What a recipe may say, and what is said of one that it may not."""

from __future__ import annotations

import pytest
import yaml

from trimtab_training.control.pair_recipe import PairRecipe, read_train_recipe
from trimtab_training.control.recipe import ControlRecipe
from trimtab_training.recipe_file import RecipeError, read_recipe

PLAIN = {
    "template": {"model_name_or_path": "org/template"},
    "control": {"config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "output_dir": "out",
    "datasets": [{"path": "a.jsonl", "format": "alpaca"}],
}


@pytest.fixture
def read(tmp_path):
    def read(*arguments: str, **keys: object) -> ControlRecipe:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(PLAIN | keys), encoding="utf-8")
        return read_recipe(ControlRecipe, tmp_path / "recipe.yaml", arguments)

    return read


def test_keys_have_the_defaults_of_transformers():
    recipe = ControlRecipe.model_validate(PLAIN)
    assert (recipe.learning_rate, recipe.per_device_train_batch_size, recipe.num_train_epochs) == (5e-5, 8, 3)
    assert (recipe.lr_scheduler_type, recipe.warmup_ratio, recipe.max_steps, recipe.seed) == (
        "linear",
        0,
        -1,
        42,
    )


def test_every_key_is_an_option_too(read):
    """Nested ones with dots, places in lists as numbers; values are YAML."""
    recipe = read("--learning_rate", "1e-4", "--template.dtype=float32", "--datasets.0.weight", "2")
    assert (recipe.learning_rate, recipe.template.dtype, recipe.datasets[0].weight) == (1e-4, "float32", 2)
    assert read("--strength", "[0.5, 1.5]").strengths == (0.5, 1.5)


def test_an_option_may_have_hyphens(read):
    assert read("--learning-rate", "1e-4", "--per-device-train-batch-size=3").per_device_train_batch_size == 3


SERVER = {"base_url": "http://localhost:8000/v1", "model": "wise"}


def taught(**keys: object) -> dict[str, object]:
    plain = {"path": "a", "format": "alpaca", "objective": "distill", "answers": "generate"}
    return {"datasets": [plain | keys]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learn_rate": 1}, "`learn_rate` is not a key of a recipe. Did you mean `learning_rate`?"),
        (
            {"template": {"model_name": "a"}},
            "`template.model_name` is not a key of a recipe. Did you mean `model_name_or_path`?",
        ),
        (
            {"datasets": [{"path": "a", "format": "alpaca", "objectiv": "retain"}]},
            "`datasets.0.objectiv` is not a key of a recipe. Did you mean `objective`?",
        ),
        (
            {"datasets": [{"path": "a", "format": "alpacca"}]},
            "`datasets.0.format`: Input should be 'messages'",
        ),
        ({"datasets": []}, "`datasets`: List should have at least 1 item"),
        (
            {"datasets": [{"path": "a", "format": "text", "bound": None}]},
            "`bound` belongs to the objective `forget`, not to `cross_entropy`",
        ),
        (
            {"datasets": [{"path": "a", "format": "text", "objective": "distill"}]},
            "the objective `distill` needs a `teacher`",
        ),
        (taught(teacher={"base_url": "http://a/v1"}), "`model` is missing: the name by which the server"),
        (
            taught(teacher={"system_prompt": "x", "top_logprobs": 3}),
            "`top_logprobs` belongs to a teacher with a `base_url`",
        ),
        (taught(teacher={}), "give a `system_prompt` (the template is the teacher) or a `base_url`"),
        (
            taught(teacher=SERVER, answers="given"),
            "a teacher behind a server gives distributions along its own answers only",
        ),
        (
            taught(teacher={"system_prompt": "x"}, objective="cross_entropy"),
            "`teacher` without a `base_url` belongs to the objective `distill`, not to `cross_entropy`",
        ),
        (
            taught(teacher=SERVER, objective="retain"),
            "`teacher` belongs to the objective `distill`, not to `retain`",
        ),
        ({"control": {}}, "`control`: give either `model_name_or_path` (a checkpoint) or `config`"),
        (
            {"control": {"config": {"hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 4}}},
            "`hidden_size` must be a multiple of twice `num_attention_heads` (4), got 30",
        ),
        ({"strength": [2, 1]}, "`strength` must be a number or [lowest, highest], got [2.0, 1.0]"),
        ({"bf16": True, "fp16": True}, "`bf16` and `fp16` exclude each other"),
        ({"lr_scheduler_type": "lin"}, "`lr_scheduler_type` must be one of linear, cosine"),
        ({"learning_rate": -1}, "`learning_rate`: Input should be greater than 0, got -1"),
        ({"report_to": "mlflow"}, "`report_to"),
        ({"name": "off"}, "'off' is no name for a control"),
    ],
)
def test_a_wrong_key_or_value_is_named(read, keys, message):
    with pytest.raises(RecipeError) as caught:
        read(**keys)
    assert message in str(caught.value)


PAIR = {
    "kind": "pair",
    "control": {"model_name_or_path": "org/small"},
    "output_dir": "out",
    "plus": {"datasets": [{"path": "a.jsonl", "format": "alpaca"}]},
}


def member(**keys: object) -> dict[str, object]:
    return {"datasets": [{"path": "a.jsonl", "format": "alpaca"} | keys]}


@pytest.fixture
def read_kind(tmp_path):
    """Read a recipe of any kind."""

    def read(*arguments: str, plain: dict[str, object] = PAIR, **keys: object) -> ControlRecipe | PairRecipe:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain | keys), encoding="utf-8")
        return read_train_recipe(tmp_path / "recipe.yaml", arguments)

    return read


def test_kind_chooses_the_keys(read_kind):
    """It is `control` if it is left out, and an option like every other key."""
    assert isinstance(read_kind(plain=PLAIN), ControlRecipe)
    assert isinstance(read_kind(plain=PLAIN, kind="control"), ControlRecipe)
    recipe = read_kind("--plus.datasets.0.weight", "2", "--minus", "{datasets: [{path: b, format: text}]}")
    assert isinstance(recipe, PairRecipe)
    assert (recipe.plus.datasets[0].weight, recipe.members["minus"].datasets[0].path) == (2, "b")
    plain = {key: value for key, value in PAIR.items() if key != "kind"}
    assert isinstance(read_kind("--kind", "pair", plain=plain), PairRecipe)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learn_rate": 1}, "`learn_rate` is not a key of a recipe. Did you mean `learning_rate`?"),
        ({"minos": member()}, "`minos` is not a key of a recipe. Did you mean `minus`?"),
        (
            {"plus": member(objectiv="forget")},
            "`plus.datasets.0.objectiv` is not a key of a recipe. Did you mean `objective`?",
        ),
        ({"minus": {"dataset": []}}, "`minus.dataset` is not a key of a recipe. Did you mean `datasets`?"),
        ({"kind": "pairs"}, "`kind` must be one of control, pair, got 'pairs'"),
        ({"kind": ["pair"]}, "`kind` must be one of control, pair, got ['pair']"),
        (
            {"template": {"model_name_or_path": "a"}},
            "`template` is a key of `kind: control`, and this recipe is `kind: pair`",
        ),
        ({"kind": "control"}, "`plus` is a key of `kind: pair`, and this recipe is `kind: control`"),
        ({"plus": member(objective="npo")}, "`plus`: the objective `npo` needs a template"),
        ({"minus": member(objective="retain")}, "`minus`: the objective `retain` needs a template"),
        (
            {"minus": member(objective="distill", teacher={"system_prompt": "x"})},
            "`minus`: the objective `distill` needs a template",
        ),
        ({"plus": member(answers="generate")}, "`plus`: `answers: generate` needs a template"),
        (
            {"control": {"config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}}},
            "`control.tokenizer_name` is missing: a fresh model of a pair needs it",
        ),
        ({"strength": [0.5, 1.5]}, "`strength`: Input should be a valid number, got [0.5, 1.5]"),
        (
            {"resume_from_checkpoint": "elsewhere/checkpoint-2"},
            "`resume_from_checkpoint` of a pair must be true or false, got 'elsewhere/checkpoint-2'",
        ),
        ({"bf16": True, "fp16": True}, "`bf16` and `fp16` exclude each other"),
        ({"lr_scheduler_type": "lin"}, "`lr_scheduler_type` must be one of linear, cosine"),
    ],
)
def test_a_wrong_key_or_value_of_a_pair_is_named(read_kind, keys, message):
    with pytest.raises(RecipeError) as caught:
        read_kind(**keys)
    assert message in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: out\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="`template` is missing"):
        read_recipe(ControlRecipe, tmp_path / "recipe.yaml")
