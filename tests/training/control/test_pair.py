"""A pair: two models that are trained alone, and one pack of their difference."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup
from typer.testing import CliRunner

import tiny
from trimtab_mappings import load_encoder, load_tokenizer
from trimtab_processors.control import Target
from trimtab_processors.pack import load_pack
from trimtab_processors.parameters import Parameters
from trimtab_processors.runtime import Runtime
from trimtab_server.cli import app
from trimtab_server.controls.prompts import Chat, load_renderer
from trimtab_training.control import pair
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.log import RunLog
from trimtab_training.control.pair import train_pair
from trimtab_training.control.trainer import Step

HALVES = ("plus", "minus")


def train(recipe) -> tuple[dict[str, list[float]], str]:
    console = Console(record=True, width=300, file=io.StringIO())
    losses = train_pair(recipe, "trimtab train recipe.yaml", console)
    return losses, console.export_text()


def read_lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(directory / half / "model.safetensors") for half in HALVES]


def require_same(one: Path, other: Path) -> None:
    """Both packs have the same weights, bit by bit, and logs of the same losses."""
    for half, ours, theirs in zip(HALVES, weights_of(one), weights_of(other), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        logs = [read_lines(directory / half / "trainer_log.jsonl") for directory in (one, other)]
        assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def train_by_hand(directory: Path, data: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a model with its own loss on all records at once: transformers and torch, nothing else."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), load_tokenizer(str(directory))
    rows, labels = [], []
    for record in read_lines(data):
        prompt = tokenizer(f"<s>user: {record['instruction']}\nassistant:", add_special_tokens=False)
        answer = tokenizer(f"{record['output']}</s>", add_special_tokens=False)
        rows.append(prompt.input_ids + answer.input_ids)
        labels.append([-100] * len(prompt.input_ids) + answer.input_ids)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    learned = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=learned).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def test_each_half_is_a_plain_training(make_pair, template):
    """The one that a loop by hand makes from the same weights, with the model's own loss."""
    keys = {"adam_epsilon": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 1}
    recipe = make_pair(**keys, per_device_train_batch_size=1, max_steps=4)
    sizes = {"plus": 5, "minus": 3}
    members = {
        half: {
            "datasets": [recipe.members[half].datasets[0].model_dump() | {"per_device_train_batch_size": n}]
        }
        for half, n in sizes.items()
    }
    for member in members.values():
        for key in ("bound", "beta", "teacher", "max_new_tokens"):
            del member["datasets"][0][key]
    losses, _ = train(make_pair(**keys, max_steps=4, **members))
    for half, trained in zip(HALVES, weights_of(recipe.output_dir), strict=True):
        expected, parameters = train_by_hand(template, members[half]["datasets"][0]["path"], 4)
        assert losses[half] == pytest.approx(expected, rel=1e-5)
        assert losses[half][-1] < losses[half][0]
        for name, tensor in trained.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), atol=1e-5, rtol=1e-4, msg=name)


def shift_of(pack: Path, target: Path, prompt: tuple[int, ...], tables: Path) -> torch.Tensor:
    """What the server's runtime adds to the logits of a target."""
    encoder = load_encoder(str(target))
    width = len(encoder.vocabulary)
    steered = Target("target", encoder, width, torch.device("cpu"))
    runtime = Runtime(steered, {"pair": str(pack)}, tables=tables)
    request = runtime.open(Parameters(control="pair", prompt=prompt, routing="pm-mined"), list(prompt), [])
    logits = torch.zeros(1, width)
    runtime.step([request])
    runtime.apply(logits, {0: [request]})
    return logits[0]


def logits_of(directory: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model(input_ids=torch.tensor([prompt])).logits[0, -1]


def test_the_packs_shift_is_plus_minus_minus(make_pair, template, tmp_path):
    """By the runtime that the server has, at the strength that the recipe gives."""
    recipe = make_pair(strength=2.0, name="polite", description="Is polite.")
    train(recipe)
    pack = load_pack(str(recipe.output_dir))
    assert (pack.name, pack.description, pack.strength) == ("polite", "Is polite.", 2.0)
    prompt = (5, 20, 31)
    plus, minus = (logits_of(recipe.output_dir / half, prompt) for half in HALVES)
    assert (plus - minus).abs().max() > 0.5
    shift = shift_of(recipe.output_dir, template, prompt, tmp_path / "tables")
    torch.testing.assert_close(shift, 2 * (plus - minus), atol=1e-3, rtol=1e-3)


def test_without_minus_it_is_the_model_before_the_training(make_pair, template):
    recipe = make_pair(minus=None)
    losses, _ = train(recipe)
    assert losses.keys() == {"plus"}
    plus, minus = weights_of(recipe.output_dir)
    before = load_file(template / "model.safetensors")
    assert all(torch.equal(minus[name], before[name]) for name in before)
    assert not any(torch.equal(plus[name], before[name]) for name in before)
    assert [part.weight for part in load_pack(str(recipe.output_dir)).components] == [1, -1]
    assert "The model before the training." in (recipe.output_dir / "README.md").read_text()


def test_fresh_halves_begin_as_the_same_model(make_pair, template):
    """Whose vocabulary is that of `tokenizer_name`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    control = {"config": sizes, "tokenizer_name": str(template)}
    twins = {half: make_pair().plus.model_dump(exclude_unset=True) for half in HALVES}
    recipe = make_pair(control=control, **twins)
    train(recipe)
    plus, minus = weights_of(recipe.output_dir)
    assert all(torch.equal(plus[name], minus[name]) for name in plus)
    assert plus["model.embed_tokens.weight"].shape == (400, 32)


def test_the_gateway_and_the_check_read_the_pack(make_pair, tmp_path):
    """With its chat template, which the recipe gives."""
    recipe = make_pair(chat_template=tiny.CONTROL_TEMPLATE, max_steps=1)
    train(recipe)
    renderer = load_renderer(load_pack(str(recipe.output_dir)))
    tokenizer = load_tokenizer(str(recipe.output_dir / "plus"))
    expected = tokenizer("user says Bada. Then:", add_special_tokens=False).input_ids
    text = renderer.render(Chat([{"role": "user", "content": "Bada"}]))
    assert renderer.encode(text, limit=100) == expected
    config = {"models": {"m": {"model": "org/name"}}, "controls": {"polite": str(recipe.output_dir)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "config.yaml")])
    assert result.output.count("400 tokens") == 2, result.output


def test_card_and_manifest_have_both_halves(make_pair, data, other_data):
    recipe = make_pair(name="polite", description="Is polite.", max_steps=4)
    losses, shown = train(recipe)
    training = load_pack(str(recipe.output_dir)).training
    card = (recipe.output_dir / "README.md").read_text()
    for half, path, name, records in (("plus", data, "data", 5), ("minus", other_data, "other", 3)):
        made = training[half]
        assert (made["steps"], made["data"][0]["records"]) == (4, records)
        assert made["loss"][name] == pytest.approx(sum(losses[half]) / 4, abs=1e-5)
        assert f"| {name} | cross_entropy | 1 | {records} |" in card
        assert f"{made['data'][0]['sha256'][path]}  {path}" in card
        assert len(read_lines(recipe.output_dir / half / "trainer_log.jsonl")) == 4
        assert (recipe.output_dir / half / "loss.svg").is_file()
        assert f"{half}, step 4: loss" in shown
    assert training["recipe"]["kind"] == "pair"
    written = yaml.safe_load((recipe.output_dir / "training_recipe.yaml").read_text())
    assert type(recipe).model_validate(written) == recipe
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["trimtab", "proxy-tuning"]


def signal_at(monkeypatch, total: int) -> None:
    """Send SIGTERM after that many steps of both halves together."""
    add, seen = RunLog.add, []

    def add_and_signal(log: RunLog, step: Step) -> None:
        add(log, step)
        seen.append(step)
        if len(seen) == total:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "add", add_and_signal)


def write(recipe, tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return str(path)


@pytest.fixture
def dropping(template, tmp_path) -> Path:
    """The template with dropout."""
    directory = tmp_path / "dropping"
    load_tokenizer(str(template)).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(template)
    model.config.attention_dropout = 0.3
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (3, "Stopped after step 3 of 6 of `plus`"),
        (6, "Stopped after step 6 of 6 of `plus`"),
        (8, "Stopped after step 2 of 6 of `minus`"),
    ],
)
def test_an_interrupted_run_equals_one_that_was_not(make_pair, dropping, tmp_path, total, message):
    """Bit by bit, in whichever half the signal comes; with dropout, so that the random state counts."""
    keys = {"control": {"model_name_or_path": str(dropping)}}
    train(make_pair(**keys, output_dir=tmp_path / "straight"))
    recipe = write(make_pair(**keys), tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        signal_at(patched, total)
        result = CliRunner().invoke(app, ["train", recipe])
    assert result.exit_code == 128 + signal.SIGTERM
    assert message in result.output
    assert "repeat the command with `--resume_from_checkpoint true`" in result.output
    assert not (tmp_path / "out" / "trimtab.json").exists()
    result = CliRunner().invoke(app, ["train", recipe, "--resume_from_checkpoint", "true"])
    assert result.exit_code == 0, result.output
    assert "Loss of the last step: plus " in result.output
    require_same(tmp_path / "straight", tmp_path / "out")


def test_two_processes_train_as_one_with_twice_the_batch(make_pair, in_two_processes, tmp_path):
    """The first one alone writes the pack and says where it is."""
    keys = {"adam_epsilon": 1e-2}
    expected, _ = train(make_pair(**keys, output_dir=tmp_path / "alone", per_device_train_batch_size=4))
    recipe = write(make_pair(**keys), tmp_path)

    def run(rank: int) -> None:
        result = CliRunner().invoke(app, ["train", recipe])
        assert result.exit_code == 0, result.output
        (tmp_path / f"said-{rank}").write_text(result.stdout)

    in_two_processes(run)
    assert (tmp_path / "said-0").read_text().startswith("Loss of the last step: plus ")
    assert (tmp_path / "said-1").read_text() == ""
    for half in HALVES:
        lines = read_lines(tmp_path / "out" / half / "trainer_log.jsonl")
        assert [line["loss"] for line in lines] == pytest.approx(expected[half], rel=1e-4)
    assert (tmp_path / "out" / "trimtab.json").is_file()


def test_a_half_that_is_done_is_not_trained_again(make_pair, tmp_path, monkeypatch):
    recipe = write(make_pair(), tmp_path)
    with monkeypatch.context() as patched:
        signal_at(patched, 8)
        CliRunner().invoke(app, ["train", recipe])
    steps = []
    add = RunLog.add
    monkeypatch.setattr(RunLog, "add", lambda log, step: (steps.append(step.step), add(log, step)))
    CliRunner().invoke(app, ["train", recipe, "--resume_from_checkpoint", "true"])
    assert steps == [3, 4, 5, 6]


def test_a_run_goes_on_with_its_own_recipe_only(make_pair):
    train(make_pair(max_steps=2))
    with pytest.raises(TrainingError, match="another recipe, other data or another number"):
        train(make_pair(max_steps=2, learning_rate=0.02, resume_from_checkpoint=True))


def test_a_directory_without_a_checkpoint_or_with_something_in_it_is_refused(make_pair):
    with pytest.raises(TrainingError, match="has no checkpoint of a pair"):
        train(make_pair(resume_from_checkpoint=True))
    train(make_pair(max_steps=1))
    with pytest.raises(TrainingError, match="is not empty"):
        train(make_pair(max_steps=1))
    train(make_pair(max_steps=1, overwrite_output_dir=True))


def test_the_data_of_both_halves_are_read_before_a_model_is_loaded(make_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pair.models, "make_control", lambda *_: pytest.fail("loaded"))
    minus = {"datasets": [{"path": str(tmp_path / "none.jsonl"), "format": "alpaca"}]}
    with pytest.raises(ValueError, match=r"none\.jsonl can't be read"):
        train(make_pair(minus=minus))


def test_a_model_with_fewer_logits_than_tokens_is_refused(make_pair, tmp_path, template):
    small = tiny.byte_level(300)
    tiny.save(tmp_path / "small", small, tiny.llama(len(small), width=64, layers=1))
    control = {"model_name_or_path": str(tmp_path / "small"), "tokenizer_name": str(template)}
    with pytest.raises(TrainingError, match="`control` has 300 logits, but its tokenizer has 400 tokens"):
        train(make_pair(control=control))
