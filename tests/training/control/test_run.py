"""A training from its recipe to its pack, and the command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiny
from trimtab_mappings import load_encoder, load_tokenizer
from trimtab_processors.control import Control, Target
from trimtab_processors.pack import load_pack
from trimtab_server.cli import app
from trimtab_training.control import run
from trimtab_training.control.data import _names
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.formats import DataError
from trimtab_training.control.log import RunLog
from trimtab_training.control.recipe import DataSet
from trimtab_training.control.trainer import Step


def train(recipe) -> tuple[list[float], str]:
    console = Console(record=True, width=300, file=io.StringIO())
    losses = run.train(recipe, "trimtab train recipe.yaml", console)
    return losses, console.export_text()


def test_a_recipe_becomes_a_pack_that_is_served(make_recipe, template, tmp_path):
    """Loaded as an engine does, beside a target of another vocabulary."""
    recipe = make_recipe(name="brief", description="Short answers.", strength=[0.4, 0.8], max_steps=30)
    losses, _ = train(recipe)
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2
    pack = load_pack(str(recipe.output_dir))
    assert (pack.name, pack.description, pack.strength) == ("brief", "Short answers.", 0.8)
    other = tmp_path / "target"
    tokenizer = tiny.metaspace(500)
    tiny.save(other, tokenizer, tiny.llama(len(tokenizer)))
    target = Target("target", load_encoder(str(other)), len(tokenizer), torch.device("cpu"))
    control = Control(
        "brief",
        str(recipe.output_dir),
        target,
        tables=tmp_path / "tables",
        cache_bytes=1 << 20,
        neutral=True,
        routing=None,
    )
    assert control.vocab_size == len(load_tokenizer(str(template)))


def test_the_pack_is_the_control_that_was_trained(make_recipe, template):
    """Its logits, added to the template's, have the loss that the log ends with."""
    recipe = make_recipe(per_device_train_batch_size=5, max_steps=40)
    losses, _ = train(recipe)
    tokenizer = load_tokenizer(str(recipe.output_dir))
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (template, recipe.output_dir)
    ]
    nats, tokens = 0.0, 0
    for line in Path(recipe.datasets[0].paths[0]).read_text().splitlines():
        row = json.loads(line)
        prompt, answer = f"<s>user: {row['instruction']}\nassistant:", f"{row['output']}</s>"
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False).input_ids])
        with torch.no_grad():
            summed = sum(model(input_ids=ids).logits[0].log_softmax(dim=-1) for model in models)
        wanted = ids[0, len(start) :]
        nats -= summed.log_softmax(dim=-1)[len(start) - 1 : -1].gather(1, wanted[:, None]).sum().item()
        tokens += len(wanted)
    assert nats / tokens == pytest.approx(losses[-1], rel=0.1)


def test_the_model_card_says_what_it_was_made_of(make_recipe, data):
    recipe = make_recipe(name="brief", description="Short answers.")
    losses, _ = train(recipe)
    card = (recipe.output_dir / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    sha256 = subprocess.run(["sha256sum", data], capture_output=True, text=True, check=True).stdout.split()[0]
    for said in (
        recipe.template.model_name_or_path,
        sha256,
        "Short answers.",
        "| cross_entropy | 1 | 5 |",
        "trimtab train",
    ):
        assert said in body
    training = load_pack(str(recipe.output_dir)).training
    assert training["steps"] == 6
    assert training["loss"]["data"] == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert training["data"][0]["records"] == 5
    assert training["recipe"]["learning_rate"] == 0.01


def test_a_masked_example_is_shown_before_the_first_step(make_recipe):
    _, shown = train(make_recipe())
    assert "What is bada?" in shown
    assert "[</s>]" in shown
    assert shown.index("[</s>]") < shown.index("step 6: loss")


def test_the_log_has_a_line_for_each_step_and_a_plot(make_recipe):
    recipe = make_recipe()
    losses, _ = train(recipe)
    lines = [json.loads(line) for line in (recipe.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"learning_rate", "epoch", "grad_norm", "strength", "elapsed_time", "total_steps"} <= lines[
        0
    ].keys()
    assert (recipe.output_dir / "loss.svg").read_text().count("<polyline") == 2


def test_epochs_count_the_first_data_set(make_recipe):
    """Five records, two a step, three times: eight steps."""
    assert len(train(make_recipe(max_steps=-1, num_train_epochs=3))[0]) == 8


def test_a_control_may_begin_as_a_checkpoint(make_recipe, template):
    recipe = make_recipe(control={"model_name_or_path": str(template)}, max_steps=1)
    train(recipe)
    started = load_file(template / "model.safetensors")
    trained = load_file(recipe.output_dir / "model.safetensors")
    assert started.keys() == trained.keys()
    assert max((trained[name] - started[name]).abs().max() for name in started) == pytest.approx(
        0.01, rel=0.1
    )


def test_a_run_goes_on_from_its_last_checkpoint(make_recipe, tmp_path):
    """To the same log and the same pack, bit by bit, as a run without a break."""
    straight = make_recipe(output_dir=tmp_path / "straight")
    train(straight)
    broken = make_recipe(output_dir=tmp_path / "broken", save_steps=4)
    train(broken)
    (broken.output_dir / "model.safetensors").unlink()
    losses, _ = train(make_recipe(output_dir=tmp_path / "broken", resume_from_checkpoint=True))
    lines = [
        (tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("straight", "broken")
    ]
    assert (
        [json.loads(line)["loss"] for line in lines[0]]
        == losses
        == [json.loads(line)["loss"] for line in lines[1]]
    )
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_may_end_where_it_began_again(make_recipe, tmp_path):
    """At its last step, from a checkpoint in another directory: pack, card and log are the same."""
    first = make_recipe(output_dir=tmp_path / "first", save_steps=6)
    losses, _ = train(first)
    checkpoint = tmp_path / "first" / "checkpoint-6"
    again, _ = train(make_recipe(save_steps=6, resume_from_checkpoint=checkpoint))
    assert again == losses
    assert (tmp_path / "out" / "loss.svg").read_text() == (tmp_path / "first" / "loss.svg").read_text()
    packs = [load_pack(str(tmp_path / name)).training for name in ("first", "out")]
    assert packs[0]["loss"] == packs[1]["loss"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_whose_log_is_missing_has_no_figures(make_recipe, tmp_path):
    """They are said to be missing; the pack is written."""
    train(make_recipe(save_steps=6, output_dir=tmp_path / "first"))
    (tmp_path / "first" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    recipe = write(make_recipe(save_steps=6), tmp_path)
    options = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-6")]
    result = CliRunner().invoke(app, ["train", recipe, *options])
    assert result.exit_code == 0, result.output
    assert "No step is logged. The pack is in" in result.output
    training = load_pack(str(tmp_path / "out")).training
    assert (training["steps"], training["loss"]) == (6, {"data": None})
    assert "| not logged |" in (tmp_path / "out" / "README.md").read_text()


def test_a_log_of_another_run_is_not_continued(make_recipe, tmp_path):
    """A run from a checkpoint elsewhere takes the log that is beside the checkpoint."""
    losses, _ = train(make_recipe(save_steps=4, output_dir=tmp_path / "first"))
    other, _ = train(make_recipe(learning_rate=1e-4))
    assert other[3] != losses[3]
    checkpoint = tmp_path / "first" / "checkpoint-4"
    again, _ = train(make_recipe(save_steps=4, resume_from_checkpoint=checkpoint))
    assert again == losses


def test_a_control_from_a_checkpoint_with_dropout_repeats(make_recipe, template, tmp_path):
    load_tokenizer(str(template)).save_pretrained(tmp_path / "dropping")
    model = AutoModelForCausalLM.from_pretrained(template)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "dropping")
    control = {"model_name_or_path": str(tmp_path / "dropping")}
    losses = [train(make_recipe(control=control, output_dir=tmp_path / name))[0] for name in ("a", "b")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("schedule", "kwargs", "reason"),
    [
        ("linear", {"num_cycles": 2}, "unexpected keyword argument 'num_cycles'"),
        ("cosine_with_min_lr", {}, "min_lr"),
    ],
)
def test_keys_that_a_schedule_does_not_take_are_named(make_recipe, schedule, kwargs, reason):
    recipe = make_recipe(lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs)
    with pytest.raises(TrainingError) as caught:
        train(recipe)
    assert f"`lr_scheduler_kwargs` must fit `lr_scheduler_type: {schedule}`" in str(caught.value)
    assert reason in str(caught.value)


def test_a_run_goes_on_with_its_own_data_and_recipe_only(make_recipe, data):
    train(make_recipe(save_steps=4))
    with pytest.raises(TrainingError, match="another recipe, other data or another number"):
        train(make_recipe(resume_from_checkpoint=True, learning_rate=0.02))
    with Path(data).open("a") as file:
        file.write(json.dumps({"instruction": "More?", "output": "No."}))
    with pytest.raises(TrainingError, match="another recipe, other data or another number"):
        train(make_recipe(resume_from_checkpoint=True))


def test_an_output_directory_with_something_in_it_is_refused(make_recipe):
    recipe = make_recipe(max_steps=1)
    train(recipe)
    with pytest.raises(TrainingError, match=r"is not empty\. Set `resume_from_checkpoint: true`"):
        train(recipe)
    with pytest.raises(TrainingError, match="has no checkpoint"):
        train(make_recipe(resume_from_checkpoint=True))
    train(make_recipe(max_steps=1, overwrite_output_dir=True))


def test_only_a_training_is_overwritten(make_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match="is not the directory of a training alone"):
        train(make_recipe(overwrite_output_dir=True))
    assert (tmp_path / "out" / "thesis.tex").is_file()


def test_models_of_different_vocabularies_are_refused_with_both_sizes(make_recipe, tmp_path):
    tokenizer = tiny.byte_level(300)
    tiny.save(tmp_path / "other", tokenizer, tiny.llama(len(tokenizer), width=64, layers=1))
    with pytest.raises(TrainingError, match=r"template \(400 tokens\) and control .*other \(300 tokens\)"):
        train(make_recipe(control={"model_name_or_path": str(tmp_path / "other")}))


def test_a_model_that_is_missing_is_named(make_recipe, tmp_path):
    with pytest.raises(TrainingError, match="nowhere"):
        train(make_recipe(template={"model_name_or_path": str(tmp_path / "nowhere")}))


def test_bad_data_fails_before_a_model_is_loaded(make_recipe, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"question": "Q", "answer": "A"}\n{"question": "Q", "answer": ""}\n')
    monkeypatch.setattr(run.models, "load_template", lambda _: pytest.fail("loaded"))
    with pytest.raises(DataError, match=r"bad\.jsonl, record 2: `answer` is missing or empty"):
        train(make_recipe(datasets=[{"path": str(tmp_path / "bad.jsonl"), "format": "tofu"}]))


@pytest.mark.skipif(bool(find_spec("wandb")), reason="wandb is installed")
def test_a_tracker_whose_package_is_missing_is_named(make_recipe):
    with pytest.raises(TrainingError, match="`report_to`: the package for 'wandb' is not installed"):
        train(make_recipe(report_to="wandb"))


def write(recipe, tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return str(path)


def test_the_command_trains(make_recipe, tmp_path):
    result = CliRunner().invoke(app, ["train", write(make_recipe(), tmp_path), "--max_steps", "2"])
    assert result.exit_code == 0, result.output
    assert "The pack is in" in result.output
    assert "--max_steps 2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learn_rate", "1"], "`learn_rate` is not a key of a recipe. Did you mean `learning_rate`?"),
        (["--max_length", "3"], "and `max_length` is 3"),
        (["--template.model_name_or_path", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(make_recipe, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["train", write(make_recipe(), tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_signal_leaves_a_checkpoint_to_go_on_from(make_recipe, tmp_path, monkeypatch):
    """The pack is the one of a run that got no signal."""
    train(make_recipe(output_dir=tmp_path / "straight"))
    add = RunLog.add

    def add_and_signal(log: RunLog, step: Step) -> None:
        add(log, step)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = write(make_recipe(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "add", add_and_signal)
        result = CliRunner().invoke(app, ["train", recipe])
    assert result.exit_code == 128 + signal.SIGTERM
    assert "Stopped after step 3 of 6" in result.output
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = CliRunner().invoke(app, ["train", recipe, "--resume_from_checkpoint", "true"])
    assert result.exit_code == 0, result.output
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_train_as_one_with_twice_the_batch(make_recipe, in_two_processes, tmp_path):
    """Started by a fork, as torchrun starts them otherwise, and joined by gloo."""
    expected, _ = train(make_recipe(output_dir=tmp_path / "alone", per_device_train_batch_size=4))
    in_two_processes(lambda _: train(make_recipe()))
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("keys", [{"cache": "exact"}, {"cache": "top_k", "top_k": 390}])
def test_a_run_with_a_cache_is_the_one_without(make_recipe, template, tmp_path, keys):
    """Or nearly, if all but the tail is kept. A second run computes nothing."""
    expected, _ = train(make_recipe(output_dir=tmp_path / "without"))
    cached = {
        "model_name_or_path": str(template),
        "dtype": "float32",
        "cache_dir": str(tmp_path / "cache"),
    } | keys
    losses, shown = train(make_recipe(output_dir=tmp_path / "first", template=cached))
    assert losses == pytest.approx(expected, rel=1e-5 if keys["cache"] == "exact" else 1e-2)
    assert "1 shards computed" in shown
    assert ("of the probability kept exactly" in shown) == (keys["cache"] == "top_k")
    again, shown = train(make_recipe(output_dir=tmp_path / "second", template=cached))
    assert again == losses
    assert "0 shards computed" in shown


def test_a_run_generates_the_answers_that_it_retains(make_recipe, template, data, tmp_path):
    """Once: the next run reads them."""
    own = {"model_name_or_path": str(template), "dtype": "float32", "cache_dir": str(tmp_path / "cache")}
    given = {
        "path": data,
        "format": "alpaca",
        "objective": "retain",
        "answers": "generate",
        "max_new_tokens": 4,
    }
    losses, shown = train(make_recipe(template=own, datasets=[given], output_dir=tmp_path / "first"))
    assert "data: retain, 5 records, 20 answer tokens" in shown
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    again, _ = train(make_recipe(template=own, datasets=[given], output_dir=tmp_path / "second"))
    assert again == losses
    assert kept.stat().st_mtime_ns == before


def test_a_project_in_which_the_command_runs_is_never_overwritten(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(max_steps=1, overwrite_output_dir=True)
    train(recipe)
    (recipe.output_dir / "notes").mkdir()
    monkeypatch.chdir(recipe.output_dir / "notes")
    with pytest.raises(TrainingError, match="is not the directory of a training alone"):
        train(recipe)


def test_data_sets_of_one_name_are_told_apart():
    paths = ("other-2.jsonl", "other.jsonl", "a/other.jsonl", "b/other.jsonl")
    sets = [DataSet(path=path, format="text") for path in paths]
    assert _names(sets) == ["other-2", "other", "other-3", "other-4"]
