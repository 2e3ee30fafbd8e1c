"""`trimtab similarity`: from a recipe to its files, on models whose shifts are known by construction."""

from __future__ import annotations

import json
import re
import shutil
from itertools import permutations
from pathlib import Path
from xml.etree import ElementTree as ET
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import tiny
from trimtab_mappings import load_vocabulary
from trimtab_training.similarity.cli import app

WIDTH = 64
TOKENIZERS = {"one": tiny.byte_level(600), "two": tiny.byte_fallback(900, seed=2)}
"""Of different kinds and vocabularies."""


def make(directory: Path, name: str, task: str | None) -> Path:
    """Save a model that sees the last byte of its text alone.

    Tuning on a task adds, to the logit of each token, a number that depends on that byte and the first
    letter of the token: the same in every vocabulary.
    """
    tokenizer = TOKENIZERS[name]
    model = tiny.save(
        directory, tokenizer, tiny.llama(len(tokenizer), width=WIDTH), seed=len(name) + len(tokenizer)
    )
    assert isinstance(model, LlamaForCausalLM)
    spelled = load_vocabulary(str(directory)).tokens
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        for token, piece in enumerate(spelled):
            model.model.embed_tokens.weight[token, (piece or b"\0")[-1] % WIDTH] = 1.0
            if task is not None:
                rng = np.random.default_rng(crc32(task.encode() + piece.lstrip()[:1]))
                model.lm_head.weight[token] += torch.from_numpy(rng.normal(size=WIDTH)).float()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [
        {
            "name": f"{name} {task}",
            "base": str(make(root / f"{name}-base", name, None)),
            "tuned": str(make(root / f"{name}-{task}", name, task)),
            "task": task,
        }
        for task in ("names", "places")
        for name in TOKENIZERS
    ]


@pytest.fixture
def recipe(models, tmp_path):
    texts = (text.strip() for text in tiny.sentences(40, seed=4) if text.isascii())
    lines = (json.dumps({"text": text}) for text in texts)
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = {
        "models": models,
        "texts": str(tmp_path / "texts.jsonl"),
        "top_k": 40,
        "max_positions": 150,
        "tables": str(tmp_path / "tables"),
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def results(recipe, *words):
    done = run(recipe, *words)
    assert done.exit_code == 0, done.output
    return json.loads((recipe.parent / "out/results.json").read_text())


def pairs_of(found) -> dict[tuple[str, str], dict]:
    return {(pair["from"], pair["to"]): pair for pair in found["pairs"]}


def test_the_same_shift_in_two_vocabularies_is_found_and_the_nulls_are_near_0(recipe, models):
    found = results(recipe)
    assert found["positions"] == 150
    pairs = pairs_of(found)
    assert pairs.keys() == set(permutations([model["name"] for model in models], 2))
    for ends in (("one names", "two names"), ("two names", "one names"), ("two places", "one places")):
        pair = pairs[ends]
        assert pair["same_task"]
        assert 0 < pair["exact"] < 1
        for measure in ("cosine", "rank_correlation"):
            values = {kind: value["mean"] for kind, value in pair[measure].items()}
            assert values["matched"] > 0.8
            assert abs(values["other_task"]) < 0.15
            assert abs(values["shuffled"]) < 0.2  # some of the positions have the same last byte
            assert values["above_shuffled"] == pytest.approx(values["matched"] - values["shuffled"])
            assert values["above_other_task"] == pytest.approx(values["matched"] - values["other_task"])
            assert pair[measure]["above_shuffled"]["low"] > 0.5
            assert all(each["low"] <= each["mean"] <= each["high"] for each in pair[measure].values())
    other = pairs["one names", "two places"]
    assert not other["same_task"]
    assert "other_task" not in other["cosine"]
    others = [pairs[f"{name} places", "two names"]["cosine"]["matched"]["mean"] for name in TOKENIZERS]
    null = pairs["one names", "two names"]["cosine"]["other_task"]["mean"]
    assert null == pytest.approx(sum(others) / 2)


def test_the_same_models_are_similar_by_1(recipe, models):
    same = [models[0], models[0] | {"name": "again"}]
    pairs = pairs_of(results(recipe, "--models", json.dumps(same)))
    for pair in pairs.values():
        assert pair["exact"] > 0.9  # special tokens are not text
        for measure in ("cosine", "rank_correlation"):
            assert pair[measure]["matched"]["mean"] == pytest.approx(1.0)
            assert pair[measure]["shuffled"]["mean"] < 0.3


def test_tables_and_a_heat_map_are_written_and_printed(recipe, models, tmp_path):
    done = run(recipe)
    assert done.exit_code == 0, done.output
    assert re.search(r"150 positions in \d+ texts\. Results: ", done.stdout)
    assert "one places: tuned model" in done.stderr
    header, _, *rows = (tmp_path / "out/results.md").read_text().splitlines()
    measures = ["cosine", "shuffled", "other task", "rank correlation", "shuffled", "other task"]
    assert header == f"| {' | '.join(['shift of', 'on', 'task', 'exact', *measures])} |"
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| one names", "two names", "names"],
        ["| two names", "one names", "names"],
        ["| one places", "two places", "places"],
        ["| two places", "one places", "places"],
    ]
    drawing = ET.parse(tmp_path / "out/results.svg").getroot()  # noqa: S314 - made here
    (first, *_), cells = drawing.findall("{*}g"), drawing.findall("{*}g/{*}rect")
    assert len(cells) == 4 * 4 * 3
    assert len([cell for cell in cells if cell.get("class") == "framed"]) == 4 * 4
    found = json.loads((tmp_path / "out/results.json").read_text())
    shown = [float(text.text) for text in first.findall("{*}text") if re.fullmatch(r"-?\d?\.\d\d", text.text)]
    assert shown == [round(pair["cosine"]["matched"]["mean"], 2) for pair in found["pairs"]]


def test_the_same_recipe_gives_the_same_results_and_another_seed_another_null(recipe):
    first = results(recipe)["pairs"]
    again = results(recipe, "--overwrite_output_dir", "true")["pairs"]
    other = results(recipe, "--overwrite_output_dir", "true", "--seed", "1")["pairs"]
    assert first == again
    assert first[0]["cosine"]["shuffled"] != other[0]["cosine"]["shuffled"]


def test_answers_are_compared_behind_their_questions(recipe, models):
    questions = [
        {"question": "Where is Bako?", "answer": "In Litu."},
        {"messages": [{"role": "user", "content": "And Zolo?"}], "answer": "Nearby."},
        {"prompt": "Mavo is", "answer": " far."},
    ]
    found = results(recipe, "--texts", "null", "--questions", json.dumps(questions))
    assert found["texts"] == 3
    assert found["positions"] >= 3 + 3  # each beginning and each end


def test_base_and_tuned_of_different_vocabularies(recipe, models):
    done = run(recipe, "--models.0.base", models[1]["base"])
    assert done.exit_code == 2
    assert "trimtab similarity: `models`: 'one names': base" in done.output
    assert "have different vocabularies. Name the base model that was tuned" in done.output


def test_special_tokens_that_tuning_added_do_not_make_another_vocabulary(recipe, models, tmp_path):
    tokenizer = tiny.byte_level(600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    shutil.copytree(models[0]["tuned"], tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "more")
    pairs = pairs_of(results(recipe, "--models.0.tuned", tmp_path / "more"))
    assert pairs["one names", "two names"]["cosine"]["matched"]["mean"] > 0.8


def test_texts_without_common_positions(recipe, tmp_path):
    (tmp_path / "lost.txt").write_text("<s><pad>", encoding="utf-8")
    done = run(recipe, "--texts", tmp_path / "lost.txt")
    assert done.exit_code == 2
    assert "there are 0 positions where every model has the end of a token" in done.output
    assert "Add texts" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_n", "5"], "`top_n` is not a key of a recipe. Did you mean `top_k`?"),
        (["--models.0.tsk", "x"], "`models.0.tsk` is not a key of a recipe. Did you mean `task`?"),
        (["--questions", "[a]"], "a recipe needs one of `texts` and `questions`, got both"),
        (["--texts", "null"], "a recipe needs one of `texts` and `questions`, got neither"),
        (["--models.1.name", "one names"], "`models`: 'one names' is listed twice"),
        (["--models.0.tuned", "./none"], "`models`: 'one names': no tokenizer can be loaded from './none'"),
        (
            ["--models.0.chat_template", "./none"],
            "`models`: 'one names': `chat_template`: ./none can't be read",
        ),
        (["--top_k", "650"], "`top_k` must be at most 600, the tokens of 'one names', got 650"),
        (["--device", "none"], "`models`: 'one names': `device`: 'none' can't be used"),
        (["--max_positions", "1"], "`max_positions`: "),
    ],
)
def test_faults_end_the_command_with_their_message(recipe, words, message):
    done = run(recipe, *words)
    assert done.exit_code == 2
    assert f"trimtab similarity: {message}" in done.output.replace("\n", " ")


def test_one_model_only(recipe, models):
    done = run(recipe, "--models", json.dumps(models[:1]))
    assert done.exit_code == 2
    assert "`models`: a comparison needs at least two models, got 1. Add another" in done.output


def test_two_models_of_different_tasks(recipe, models):
    done = run(recipe, "--models", json.dumps([models[0], models[2]]))
    assert done.exit_code == 2
    assert "no two models have the same `task`, got names, places" in done.output


def test_a_text_that_exceeds_a_context(recipe, tmp_path):
    (tmp_path / "long.txt").write_text("Bako litu. " * 200, encoding="utf-8")
    done = run(recipe, "--texts", tmp_path / "long.txt", "--max_characters", "2200")
    assert done.exit_code == 2
    assert re.search(
        r"a text has \d+ tokens, but the context of .* is 256\. Set a lower `max_characters`", done.output
    )


def test_the_recipe_of_the_document_runs(models, tmp_path, monkeypatch):
    """With the models of this test."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/similarity.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {model["task"] for model in yaml.safe_load(text)["models"]} == {"alpaca", "names"}
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text('{"text": "Bako litu mavo."}\n', encoding="utf-8")
    words = ["--tables", tmp_path / "tables"]
    for place, model in enumerate(models[: len(yaml.safe_load(text)["models"])]):
        words += [f"--models.{place}.base", model["base"], f"--models.{place}.tuned", model["tuned"]]
    done = run("recipe.yaml", *words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "shifts/results.svg").is_file()
