"""The command `trimtab`."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from trimtab_server.cli import app

HEAVY = ("torch", "transformers", "fastapi", "aiohttp", "vllm", "uvicorn")


def run(*words: str):
    return CliRunner().invoke(app, words)


def test_the_version_is_the_packages():
    assert run("--version").output == f"trimtab {version('trimtab')}\n"


def test_help_names_every_command():
    output = run("--help").output
    assert all(name in output for name in ("serve", "check", "schema", "map", "world", "demo"))


@pytest.mark.parametrize("words", [["--help"], ["map", "--help"], ["map", "build", "--help"]])
def test_help_and_maps_start_without_anything_heavy(words):
    code = f"""
import sys
from trimtab_server.cli import app
try:
    app({words!r})
except SystemExit as ended:
    assert not ended.code, ended.code
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_reads_tokenizers_without_torch(write_config, family):
    config = write_config(
        {"models": {"m": {"model": str(family.a)}}, "controls": {"c": str(family.control)}, "port": 0}
    )
    code = f"""
import sys
from trimtab_server.cli import main
sys.argv = ["trimtab", "check", {str(config)!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
import torch
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['transformers']"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "option"), [(["map", "build"], "--target"), (["world", "make"], "--seed"), (["demo"], "--")]
)
def test_a_mounted_command_keeps_its_own_name_and_options(words, option):
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_server", *words, "--help"], capture_output=True, text=True, check=True
    )
    assert f"trimtab {' '.join(words)}" in done.stdout
    assert option in done.stdout


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_wrong_key_is_said_without_a_traceback(write_config, command):
    result = run(command, str(write_config({"models": {"m": {"model": "x", "agrs": {}}}})))
    assert result.exit_code == 2
    assert "models.m.agrs: unknown key" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_pack_that_cant_be_read_is_named(write_config, tmp_path, command):
    (tmp_path / "trimtab.json").write_text('{"strenght": 1}')
    result = run(command, str(write_config({"models": {"m": {"model": "x"}}, "controls": {"c": "."}})))
    assert result.exit_code == 2
    assert "controls.c:" in result.output
    assert "strenght" in result.output


def test_logs_that_cant_be_written_start_nothing(write_config, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("serve", str(write_config({"models": {"m": {"model": "x"}}, "logs": "file/logs"})))
    assert result.exit_code == 2
    assert "logs: the directory can't be made" in result.output


def test_a_certificate_that_cant_be_read_starts_nothing(write_config):
    config = {"models": {"m": {"model": "x"}}, "tls": {"certfile": "missing.pem"}}
    result = run("serve", str(write_config(config)))
    assert result.exit_code == 2
    assert "tls.certfile: " in result.output
