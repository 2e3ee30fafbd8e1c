"""A miniature world, made from nothing: what it consists of, and that it is made once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from imports import TRAINING, training_imports
from miniature import miniature
from trimtab_mappings import load_vocabulary
from trimtab_processors.pack import load_pack
from trimtab_training.world import cli
from trimtab_training.world.evaluate import STRENGTHS, Figure, evaluate
from trimtab_training.world.offline import Offline
from trimtab_training.world.recall import recall
from trimtab_training.world.steer import load
from trimtab_training.world.world import (
    _SOURCES,
    GateError,
    WorldError,
    load_world,
    make_world,
    world_key,
)


def test_a_world_is_read_as_it_was_made(mini_world):
    assert load_world(mini_world.directory) == mini_world
    assert len(mini_world.held_out) == 2
    assert not {p.name for p in mini_world.held_out} & {p.name for p in mini_world.people[:4]}


def test_its_models_load_from_their_directories(mini_world):
    """Each with a vocabulary that can be mapped, and a chat template."""
    for directory in (*mini_world.models.values(), mini_world.control):
        loaded = load(directory)
        assert len(load_vocabulary(str(directory))) == loaded.model.config.vocab_size
        assert loaded.tokenizer.chat_template
        assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id


def test_its_control_is_a_pack_that_has_learned_something(mini_world):
    pack = load_pack(str(mini_world.control))
    assert (pack.name, pack.strength) == ("manners", 1.0)
    assert pack.training["settings"]["steps"] == 2
    assert load(mini_world.control).model.get_output_embeddings().weight.any()


def test_the_second_making_makes_nothing(mini_world):
    again = make_world(mini_world.directory, 5, pytest.fail, miniature())
    assert again == mini_world


def test_another_seed_or_setting_is_another_world():
    keys = {world_key(5, miniature()), world_key(6, miniature()), world_key(5, miniature(trained=3))}
    assert len(keys) == 3


def test_the_key_covers_every_module_that_decides_what_is_made():
    """All that they import; of `training_run` the accelerator alone."""
    undecided = {"control.errors", "control.formats", "control.top_log_probs", "recipe_file"}
    undecided |= {"world.cache", "world.parallel"}
    sources = {f"{package}.{module}" for package, modules in _SOURCES.items() for module in modules}
    imported = {
        module
        for source in sources - {"control.training_run"}
        for module in training_imports(TRAINING.joinpath(*source.split(".")).with_suffix(".py"))
    }
    assert imported - undecided == sources


def test_the_same_seed_makes_the_same_models_in_any_number_of_processes(mini_world, tmp_path):
    again = make_world(tmp_path / "again", 5, settings=miniature(), jobs=2)
    for name in (*mini_world.models, "control"):
        ours, theirs = (load(w.directory / name).model.state_dict() for w in (mini_world, again))
        assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_a_base_model_that_has_not_learned_its_facts_stops_the_making(tmp_path):
    """The message gives the figure, and nothing is left that could be taken for a world."""
    with pytest.raises(
        GateError, match=r"base model '[abc]' completes 0\.\d{3} of its facts .* at least 0\.95"
    ):
        make_world(tmp_path / "world", 5, settings=miniature(gate=0.95), jobs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_world_that_is_described_otherwise_is_made_anew(tmp_path):
    """By an older or a newer version."""
    directory = tmp_path / "world"
    directory.mkdir()
    (directory / "world.json").write_text('{"version": 0}')
    assert make_world(directory, 5, settings=miniature(), jobs=1) == load_world(directory)


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(WorldError, match="is not empty and holds no world"):
        make_world(tmp_path, 5, settings=miniature())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_recall_counts_the_facts_that_are_completed(mini_world):
    """A model that gives every token the same logits completes none."""
    loaded = load(mini_world.models["a"])
    torch.nn.init.zeros_(loaded.model.get_output_embeddings().weight)
    assert recall(loaded.model, loaded.tokenizer, mini_world.people) == 0


def test_it_is_evaluated_offline(mini_world):
    results = evaluate(mini_world.held_out, Offline(mini_world, "c").answer)
    assert list(results) == list(STRENGTHS)
    assert all(set(figures) == set(Figure) for figures in results.values())


def test_the_command_evaluates_the_worlds_of_several_seeds(mini_world, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "make_visibly", lambda directory, seed: mini_world)
    output = tmp_path / "figures.json"
    result = CliRunner().invoke(cli.app, ["evaluate", "1", "2", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "### median" in result.stdout
    assert json.loads(output.read_text()) == json.loads(result.stdout.splitlines()[-1])
    assert list(json.loads(output.read_text())) == ["seed 1", "seed 2", "median"]


def test_the_command_says_what_is_wrong_and_nothing_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(cli.app, ["make", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not empty and holds no world" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_reading_a_world_loads_no_torch():
    """A second `trimtab demo` starts at once."""
    code = "import sys, trimtab_training.demo.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
