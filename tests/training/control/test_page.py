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
from trimtab_training.control.recipe import Architecture, ControlModel, ControlRecipe, DataSet, TemplateModel

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def test_its_recipe_becomes_a_pack(tmp_path, template, monkeypatch):
    """With a tiny template and fewer steps; everything else is as it is there."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
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


def test_it_has_every_key_and_every_format():
    table = PAGE.split("## Keys")[1]
    for section in (ControlRecipe, TemplateModel, ControlModel, DataSet, Architecture):
        missing = [key for key in section.model_fields if not re.search(rf"`[\w.]*\b{key}\b", table)]
        assert missing == []
    assert [name for name in _COLUMNS if f"| `{name}` |" not in PAGE] == []
