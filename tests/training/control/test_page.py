"""docs/training.md: its example trains, and it has every key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from trimtab_processors.pack import load_pack
from trimtab_server.cli import app
from trimtab_training.control.formats import _COLUMNS
from trimtab_training.control.pair_recipe import PairMember, PairRecipe
from trimtab_training.control.recipe import Architecture, ControlModel, ControlRecipe, DataSet, TemplateModel

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def recipe_of(name: str) -> str:
    """The recipe of that file name."""
    (text,) = re.findall(rf"^```yaml\n# {name}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def test_its_recipe_becomes_a_pack(tmp_path, template, monkeypatch):
    """With a tiny template and fewer steps; everything else is as it is there."""
    monkeypatch.chdir(tmp_path)
    text = recipe_of("recipe.yaml")
    (row,) = re.findall(r"has lines such as `(\{.*?\})`", PAGE)
    for data_set in yaml.safe_load(text)["datasets"]:
        (tmp_path / data_set["path"]).write_text(row, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    options = ["--template.model_name_or_path", str(template), "--max_steps", "2", "--use_cpu", "true"]
    options += ["--template.cache_dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, ["train", "recipe.yaml", *options])
    assert result.exit_code == 0, result.output
    assert load_pack("packs/discreet").training["steps"] == 2
    assert json.loads(row).keys() <= _COLUMNS["alpaca"].keys()


def test_its_pair_becomes_a_pack(tmp_path, template, monkeypatch):
    """With a tiny model and fewer steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("other.jsonl", "secrets.jsonl"):
        (tmp_path / name).write_text(json.dumps({"instruction": name, "output": "Bada."}), encoding="utf-8")
    (tmp_path / "pair.yaml").write_text(recipe_of("pair.yaml"), encoding="utf-8")
    options = ["--control.model_name_or_path", str(template), "--max_steps", "2", "--use_cpu", "true"]
    result = CliRunner().invoke(app, ["train", "pair.yaml", *options])
    assert result.exit_code == 0, result.output
    pack = load_pack("packs/forgetful")
    assert [component.weight for component in pack.components] == [1, -1]
    assert [pack.training[half]["data"][0]["records"] for half in ("plus", "minus")] == [1, 2]


def test_it_has_every_key_and_every_format():
    table = PAGE.split("## Keys")[1]
    for section in (
        ControlRecipe,
        PairRecipe,
        PairMember,
        TemplateModel,
        ControlModel,
        DataSet,
        Architecture,
    ):
        missing = [key for key in section.model_fields if not re.search(rf"`[\w.]*\b{key}\b", table)]
        assert missing == []
    assert [name for name in _COLUMNS if f"| `{name}` |" not in PAGE] == []
