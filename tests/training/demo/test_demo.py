"""The demo: its configuration, and all of it with real engines."""

from __future__ import annotations

import io
import os
import shlex
import socket

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from serving import free_port
from trimtab_server.config.schema import load_settings
from trimtab_training.demo import demo
from trimtab_training.world.evaluate import Figure


def test_every_model_is_served_on_a_core_of_its_own_as_far_as_there_are_cores(mini_world, tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(demo.server_config(mini_world, 8000)))
    settings = load_settings(path)
    cores = [model.env["VLLM_CPU_OMP_THREADS_BIND"] for model in settings.models.values()]
    assert len(set(cores)) == min(3, len(os.sched_getaffinity(0)))
    assert set(settings.models) == set(mini_world.models)
    assert settings.controls == {"manners": str(mini_world.control)}


def test_a_taken_port_is_named_before_anything_is_made(tmp_path):
    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(demo.app, ["--directory", str(tmp_path / "world"), "--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} is taken: choose another with --port" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_pasted_is_one_command_and_one_program(mini_world, tmp_path):
    text = demo._to_paste("http://127.0.0.1:8000", mini_world, tmp_path)
    curl = next(line for line in text.splitlines() if line.startswith("curl"))
    assert shlex.split(curl)[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert yaml.safe_load(shlex.split(curl)[-1])["control"] == "manners"
    program = text[text.index("from openai") : text.index("Ctrl-C")]
    compile(program, "pasted", "exec")


@pytest.mark.engine
def test_the_demo_serves_asks_and_measures(mini_world, monkeypatch):
    """With models that know nothing; the tables are whole all the same, and the server ends."""
    port = free_port()
    monkeypatch.setattr(demo, "make_visibly", lambda directory, seed: mini_world)
    result = CliRunner().invoke(demo.app, ["--port", str(port), "--exit"])
    assert result.exit_code == 0, result.output
    assert all(figure.value in result.stdout for figure in Figure)
    assert result.stdout.count("Qwen2") >= 1
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((demo.HOST, port))


def test_without_a_terminal_each_state_of_a_model_has_a_line(mini_world, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(demo, "_console", Console(file=written))
    with demo._states_shown(mini_world) as report:
        for states in ({}, {"a": "starting"}, {"a": "starting", "b": "ready"}, {"a": "ready", "b": "ready"}):
            report(states)
    titles = [demo.TITLES[name] for name in "aba"]
    assert written.getvalue().splitlines() == [
        f"serve {titles[0]}: starting",
        f"serve {titles[1]}: ready",
        f"serve {titles[2]}: ready",
    ]
