"""`trimtab map`, and how little the package needs before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from trimtab_mappings import MappingTable
from trimtab_mappings.cli import app


@pytest.fixture
def directories(gpt2_like, llama_like, tmp_path):
    target, control = tmp_path / "target", tmp_path / "control"
    gpt2_like.tokenizer.save_pretrained(target)
    llama_like.tokenizer.save_pretrained(control)
    return str(target), str(control)


def invoke(target, control, output):
    arguments = ["--target", target, "--control", control, "--output", str(output)]
    return CliRunner().invoke(app, ["build", *arguments])


def test_build_writes_a_table_and_says_what_it_built(directories, gpt2_like, llama_like, tmp_path):
    output = tmp_path / "table.safetensors"
    result = invoke(*directories, output)
    assert result.exit_code == 0, result.output
    table = MappingTable.load(output)
    table.check(gpt2_like.vocabulary, llama_like.vocabulary)
    assert (table.target_name, table.control_name) == directories
    first, *rest = result.output.splitlines()
    assert first.startswith(f"{output}: {len(table.mapping)} rows in ")
    assert [line.split()[:2] for line in rest] == [
        [kind, str(count)] for kind, count in table.coverage._asdict().items()
    ]


def test_a_directory_without_a_tokenizer_ends_in_a_message(directories, tmp_path):
    result = invoke(str(tmp_path), directories[1], tmp_path / "table.safetensors")
    assert result.exit_code == 1
    assert f"error: no tokenizer can be loaded from '{tmp_path}'" in result.stderr


def test_a_file_that_can_not_be_written_ends_in_a_message(directories, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(*directories, tmp_path / "file" / "table.safetensors")
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert str(tmp_path / "file") in result.stderr


@pytest.mark.parametrize("module", ["trimtab_mappings", "trimtab_mappings.cli"])
def test_importing_loads_no_heavy_library(module):
    heavy = {"torch", "transformers", "tokenizers", "xgrammar", "vllm", "fastapi"}
    program = f"import sys, {module}; print(*{heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
