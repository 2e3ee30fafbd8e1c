"""TOFU on tiny models: from the data to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from trimtab_training.evaluation.cli import app
from trimtab_training.evaluation.recipe import Question, TargetSettings, TofuSettings
from trimtab_training.evaluation.target import load_target
from trimtab_training.evaluation.tofu_run import load_tofu
from trimtab_training.recipe_file import RecipeError

SHARED = Path(__file__).parents[4] / "shared/data/tofu"
FILES = (
    "forget10_perturbed.json",
    "retain_perturbed.json",
    "real_authors_perturbed.json",
    "world_facts_perturbed.json",
)


def records(number: int, *, paraphrased: bool) -> list[dict]:
    made = [
        {
            "question": f"Where is {name}{number}?",
            "answer": f"{name} mavo",
            "perturbed_answer": [f"{name} dera", "zolo pinu litu"],
        }
        for name in ("Bako", "Litu", "Zolo")
    ]
    if not paraphrased:
        return made
    extra = {"paraphrased_answer": "mavo it is", "paraphrased_question": "Where, then?"}
    return [record | extra for record in made]


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for number, name in enumerate(FILES):
        lines = [json.dumps(record) for record in records(number, paraphrased=number < 2)]
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def recipe(family, data, tmp_path):
    file = tmp_path / "recipe.yaml"
    content = {
        "target": {"model_name_or_path": str(family.b)},
        "control": str(family.control),
        "strengths": [0, 1],
        "tofu": {"path": str(data), "max_new_tokens": 4},
        "tables": str(tmp_path / "tables"),
        "output_dir": str(tmp_path / "out"),
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_tofu_becomes_the_files_of_both_projects(recipe, tmp_path, family):
    done = run(recipe)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    assert {place.name for place in (out / "tofu").iterdir()} == {"strength-0", "strength-1-path"}
    summaries = {}
    for place in (out / "tofu").iterdir():
        assert {file.name for file in place.iterdir()} == {
            "TOFU_EVAL.json",
            "TOFU_SUMMARY.json",
            "eval_log_aggregated.json",
        }
        summaries[place.name] = json.loads((place / "TOFU_SUMMARY.json").read_text())
    assert summaries["strength-0"]["forget_quality"] is None
    assert summaries["strength-0"]["forget_Q_A_Prob"] != summaries["strength-1-path"]["forget_Q_A_Prob"]
    result = json.loads((out / "results.json").read_text())["tofu"]
    assert [entry["strength"] for entry in result] == [0, 1]
    assert result[0]["model_utility"] == summaries["strength-0"]["model_utility"]
    assert len((out / "results.md").read_text().splitlines()) == 2 + 2
    assert not (out / "results.svg").exists()


def test_the_losses_are_those_of_transformers(recipe, tmp_path, family):
    """Question and answer as one sequence, the end of text among the answer's tokens."""
    run(recipe)
    log = json.loads((tmp_path / "out/tofu/strength-0/eval_log_aggregated.json").read_text())
    target = load_target(TargetSettings(model_name_or_path=str(family.b)))
    prompt = target.encode(Question(question="Where is Bako0?"))
    answer = [*target.tokenizer("Bako mavo", add_special_tokens=False).input_ids, target.ends[0]]
    labels = torch.tensor([[*[-100] * len(prompt), *answer]])
    with torch.no_grad():
        loss = target.model(torch.tensor([[*prompt, *answer]]), labels=labels).loss
    forget = log["eval_log_forget.json"]
    assert forget["avg_gt_loss"]["0"] == pytest.approx(float(loss), abs=1e-4)
    assert forget["num_token_gt"]["0"] == len(answer)
    assert forget["avg_paraphrased_loss"]["0"] != forget["avg_gt_loss"]["0"]
    authors = log["eval_real_author_wo_options.json"]
    assert authors["avg_paraphrased_loss"] == authors["avg_gt_loss"]


def test_forget_quality_against_another_model(recipe, tmp_path, family):
    run(recipe, "--target.model_name_or_path", family.a, "--strengths", "0", "--output_dir", tmp_path / "a")
    log = tmp_path / "a/tofu/strength-0/eval_log_aggregated.json"
    done = run(recipe, "--tofu.retain_logs_path", log)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out/tofu/strength-0/TOFU_SUMMARY.json").read_text())
    assert 0 < summary["forget_quality"] <= 1


def test_forget_quality_against_itself_is_refused_when_the_rest_is_written(recipe, tmp_path):
    run(recipe, "--strengths", "0", "--output_dir", tmp_path / "first")
    done = run(recipe, "--tofu.retain_logs_path", tmp_path / "first/tofu/strength-0/TOFU_EVAL.json")
    assert done.exit_code == 2
    assert "its forget quality would be 1 by construction" in done.output
    assert "Everything else is in" in done.output
    out = tmp_path / "out/tofu"
    own, controlled = (
        json.loads((out / name / "TOFU_SUMMARY.json").read_text())["forget_quality"]
        for name in ("strength-0", "strength-1-path")
    )
    assert own is None
    assert controlled is not None


def test_questions_can_be_fewer_and_others(data):
    read = load_tofu(TofuSettings(path=data, ds_size=2, question_key="paraphrased_question"))
    assert [len(of_set) for of_set in read.records.values()] == [2, 2, 2, 2]
    assert [of_set[0].question.text for of_set in read.records.values()] == [
        "Where, then?",
        "Where, then?",
        "Where is Bako2?",
        "Where is Bako3?",
    ]
    assert read.count == 2 * (2 * 5 + 2 * 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no records"),
        ("{", "record 1 is not a record of TOFU"),
        ('{"question": "x"}', "record 1 has no 'answer'"),
        ('{"question": "x", "answer": "y"}', "record 1 has no 'perturbed_answer'"),
        ('{"question": "x", "answer": "y", "perturbed_answer": []}', "record 1 has no perturbed answers"),
        ("[]", "record 1 is not a record of TOFU"),
    ],
)
def test_data_that_is_wrong(data, line, message):
    (data / "forget10_perturbed.json").write_text(line)
    with pytest.raises(RecipeError, match=r"`tofu\.path`: ") as caught:
        load_tofu(TofuSettings(path=data))
    assert message in str(caught.value)


def test_data_that_is_not_there(data):
    with pytest.raises(RecipeError, match=r"`tofu.path`: .*forget01_perturbed\.json can't be read"):
        load_tofu(TofuSettings(path=data, forget_split="forget01"))


def test_a_retain_log_of_another_number_of_questions_is_refused_at_once(recipe, tmp_path):
    run(recipe, "--strengths", "0", "--tofu.ds_size", "2", "--output_dir", tmp_path / "two")
    done = run(recipe, "--tofu.retain_logs_path", tmp_path / "two/tofu/strength-0/TOFU_EVAL.json")
    assert done.exit_code == 2
    assert "`tofu.retain_logs_path` is of 2 questions, this evaluation of 3" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no copy of TOFU beside the checkout")
def test_the_real_data_is_read():
    read = load_tofu(TofuSettings(path=SHARED))
    assert {name: len(of_set) for name, of_set in read.records.items()} == {
        "forget": 400,
        "retain": 400,
        "ra": 100,
        "wf": 117,
    }
    assert {len(record.perturbed) for record in read.records["forget"]} == {5}
    assert read.records["forget"][0].base != read.records["forget"][0].answer
    assert read.records["wf"][0].base == read.records["wf"][0].answer == "Paris"
