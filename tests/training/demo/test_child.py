"""The server as a child process; its workers have vLLM's interface and no model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import yaml

import fake_vllm
from processes import lives
from serving import free_port
from trimtab_training.demo.child import ServerError, serving, stop, wait_until_ready
from trimtab_training.world.signals import signals_as_exits


@pytest.fixture
def config(tmp_path):
    """Write a configuration of two models with fake workers; returns its path and the server's address."""

    def write(**env) -> tuple:
        port = free_port()
        model = {"model": str(tmp_path), "command": [sys.executable, fake_vllm.__file__], "env": env}
        path = tmp_path / "trimtab.yaml"
        path.write_text(
            yaml.safe_dump({"port": port, "logs": "logs", "models": {"one": model, "two": model}})
        )
        return path, f"http://127.0.0.1:{port}"

    return write


def test_a_server_is_waited_for_and_ends_with_the_block(config, tmp_path):
    path, url = config()
    states = []
    with serving(path, tmp_path / "log") as process:
        wait_until_ready(process, url, tmp_path / "log", states.append, seconds=60)
        assert lives(process.pid)
    assert not lives(process.pid)
    assert states[-1] == {"one": "ready", "two": "ready"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_as_well(config, tmp_path, number):
    path, url = config()
    with pytest.raises(SystemExit) as exit_, signals_as_exits(), serving(path, tmp_path / "log") as process:  # noqa: PT012
        wait_until_ready(process, url, tmp_path / "log", lambda _: None, seconds=60)
        os.kill(os.getpid(), number)
    assert exit_.value.code == 128 + number
    assert not lives(process.pid)


def test_a_server_that_ends_by_itself_is_reported_with_its_last_words(config, tmp_path):
    path, url = config()
    path.write_text("models: 7")
    log = tmp_path / "log"
    with (
        serving(path, log) as process,
        pytest.raises(ServerError, match=r"ended with status 2; the end of [\s\S]*models"),
    ):
        wait_until_ready(process, url, log, lambda _: None, seconds=60)


def test_a_model_that_can_not_be_started_is_named(config, tmp_path):
    path, url = config(FAKE_FAIL=1)
    path.write_text(path.read_text() + "restarts: {attempts: 0}\n")
    with (
        serving(path, tmp_path / "log") as process,
        pytest.raises(ServerError, match=r"could not start|ended with status 1"),
    ):
        wait_until_ready(process, url, tmp_path / "log", lambda _: None, seconds=60)


def test_a_server_that_takes_too_long_is_not_waited_for(config, tmp_path):
    path, url = config(FAKE_START_SECONDS=60)
    with (
        serving(path, tmp_path / "log") as process,
        pytest.raises(ServerError, match="not ready after 1 seconds"),
    ):
        wait_until_ready(process, url, tmp_path / "log", lambda _: None, seconds=1)
    assert not lives(process.pid)


def test_a_process_that_will_not_end_is_killed():
    code = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        process.stdout.readline()
        stop(process, seconds=0.2)
    assert process.returncode == -signal.SIGKILL
