"""`trimtab eval`: from a recipe to its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trimtab_training.evaluation.cli import app

GROUPS = [
    {
        "name": "places",
        "scores": ["contains", "refuses"],
        "questions": [{"question": f"Where is {name}?", "answer": name} for name in ("Bako", "Litu", "Zolo")],
    },
    {"name": "texts", "scores": "rougeL_recall", "questions": [{"prompt": "Bako", "answer": "litu"}]},
]


@pytest.fixture
def recipe(family, tmp_path):
    data = {
        "target": {"model_name_or_path": str(family.b)},
        "control": str(family.control),
        "strengths": [0, 0.5, 1],
        "routings": ["path", "pm-mined"],
        "groups": GROUPS,
        "max_new_tokens": 4,
        "tables": str(tmp_path / "tables"),
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_recipe_becomes_answers_tables_and_a_plot(recipe, tmp_path):
    done = run(recipe)
    assert done.exit_code == 0, done.output
    assert "20 answers" in done.output
    out = tmp_path / "out"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * (1 + 2 * 2)
    results = json.loads((out / "results.json").read_text())
    assert results["recipe"]["strengths"] == [0, 0.5, 1]
    for cell in results["cells"]:
        scores = [
            answer["scores"][cell["score"]]
            for answer in answers
            if all(answer[key] == cell[key] for key in ("group", "strength", "routing"))
        ]
        assert len(scores) == cell["questions"]
        assert cell["mean"] == pytest.approx(sum(scores) / len(scores))
        assert cell["low"] <= cell["mean"] <= cell["high"]
        assert cell["change"]["mean"] == 0 or cell["strength"]
    header, _, *rows = (out / "results.md").read_text().splitlines()
    assert header == "| group | score | n | routing | strength 0 | strength 0.5 | strength 1 |"
    assert len(rows) == 2 * (2 + 1)
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', (out / "results.svg").read_text())
    assert len(lines) == len(rows)
    assert all(len(line.split()) == 3 for line in lines)


def test_the_recipe_of_the_document_runs(family, tmp_path, monkeypatch):
    """With the models of this test."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    models = ["--target.model_name_or_path", family.b, "--control", family.control]
    done = run("recipe.yaml", *models, "--tables", tmp_path, "--max_new_tokens", "2")
    assert done.exit_code == 0, done.output
    assert "21 answers" in done.output


def test_the_same_recipe_gives_the_same_answers(recipe, tmp_path):
    run(recipe)
    run(recipe, "--output_dir", tmp_path / "again")
    assert (tmp_path / "again/answers.jsonl").read_text() == (tmp_path / "out/answers.jsonl").read_text()


def test_options_replace_keys(recipe, tmp_path):
    done = run(recipe, "--strengths", "0", "--output_dir", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert "4 answers" in done.output
    assert (tmp_path / "other/results.json").is_file()


def test_results_are_not_overwritten_unasked(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    done = run(recipe)
    assert done.exit_code == 2
    assert "`output_dir`: " in done.output
    assert "is not empty. Choose another, or set `overwrite_output_dir: true`" in done.output
    assert run(recipe, "--overwrite_output_dir", "true").exit_code == 0


def test_an_output_directory_that_cannot_be_made(recipe, tmp_path):
    (tmp_path / "file").touch()
    done = run(recipe, "--output_dir", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert "can't be made" in done.output


def test_faults_end_the_command_with_their_message(recipe):
    done = run(recipe, "--strenghts", "1")
    assert done.exit_code == 2
    assert "trimtab eval: `strenghts` is not a key of a recipe. Did you mean `strengths`?" in done.output
