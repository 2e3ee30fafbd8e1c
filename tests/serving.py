"""A real gateway with real workers, as its own process, for tests."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

START_SECONDS = 400
STOP_SECONDS = 60
ENGINE = {"dtype": "float32", "enforce-eager": True, "max-model-len": 256}


def engine_environment(core: int) -> dict[str, str]:
    """One core a worker: two OpenMP teams on one core wait for each other."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def gateway(directory: Path, config: dict) -> Iterator[str]:
    """Serve `config` until the block ends; yields the base URL once every worker answers."""
    port = free_port()
    path = directory / "trimtab.yaml"
    path.write_text(yaml.safe_dump({"port": port, "logs": str(directory / "logs"), **config}))
    with (directory / "gateway.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab_server", "serve", str(path)], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_answers(f"{url}/ready", process, directory / "gateway.log")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


def wait_until_answers(
    url: str, process: subprocess.Popen, log: Path, seconds: float = START_SECONDS
) -> None:
    """Ask until there is an answer that is no error; a process that ends or is too slow is killed.

    Raises:
        RuntimeError: with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(0.3)
    process.kill()
    raise RuntimeError(f"{url} did not answer:\n{log.read_text()[-4000:]}")


def get_json(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)
