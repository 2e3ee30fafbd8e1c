"""A gateway as its own process, its workers processes that have vLLM's interface and no model, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import openai
import yaml
from prometheus_client.parser import text_string_to_metric_families

import fake_vllm
from processes import lives
from serving import free_port

FAKE = [sys.executable, fake_vllm.__file__]
CHAT = "/v1/chat/completions"


class Served:
    """A gateway that runs, its log, and what there is of its workers."""

    def __init__(self, directory: Path, config: dict) -> None:
        self.port = config.setdefault("port", free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / "gateway.log"
        self._clients: list[openai.OpenAI] = []
        # Not below `directory`, whose long name would not leave room for a socket's.
        self._temporary = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))
        path = directory / "trimtab.yaml"
        path.write_text(yaml.safe_dump({"logs": "logs", "tables": "tables", **config}))
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trimtab_server", "serve", str(path), "--verbose"],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self._temporary)},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def leftovers(self) -> list[Path]:
        """Temporary files of the gateway's and its workers'."""
        return list(self._temporary.iterdir())

    @property
    def children(self) -> list[int]:
        """Worker processes and their children, which the log names."""
        return [int(pid) for pid in re.findall(r"(?:child|fake server) (\d+)", self.log)]

    def newest(self, model: str) -> int:
        """The process of the model's worker that was started last."""
        return int(re.findall(rf"\[{model}\] fake server (\d+)", self.log)[-1])

    def client(self, **options) -> openai.OpenAI:
        """A client, which is closed with the gateway."""
        client = openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options}
        )
        self._clients.append(client)
        return client

    def get(self, path: str) -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def model(self, name: str = "m") -> dict:
        """What `/ready` says of it."""
        return self.get("/ready")[1]["models"][name]

    def seen(self, model: str) -> dict:
        """What the worker has been asked."""
        return self.get(f"/fake/seen?model={model}")[1]

    def wait_for(self, what, seconds: float = 15):
        """Poll until `what()` is true; returns it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if found := what():
                    return found
            time.sleep(0.03)
        raise AssertionError(f"it did not come to pass; the gateway's log:\n{self.log}")

    def wait_until_ready(self) -> Served:
        self.wait_for(lambda: self.get("/ready")[0] == 200, seconds=240)
        return self

    def samples(self) -> dict[tuple, float]:
        """The metrics, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as response:
            text = response.read().decode()
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def stop(self, number: int = signal.SIGTERM, seconds: float = 15) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def assert_nothing_is_left(self) -> None:
        assert [pid for pid in self.children if lives(pid)] == []
        assert self.leftovers == []

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for client in self._clients:
            client.close()
        shutil.rmtree(self._temporary)


@contextlib.contextmanager
def served(directory: Path, **config):
    models = config.setdefault("models", {"m": {}})
    for model in models.values():
        model.setdefault("model", "org/name")
        model.setdefault("command", FAKE)
    config.setdefault("restarts", {"backoff": 0.1, "longest": 0.2})
    config.setdefault("pass_through", ["/fake/seen"])
    config["timeouts"] = {"stop": 1, "drain": 5, **config.get("timeouts", {})}
    gateway = Served(directory, config)
    try:
        yield gateway
    finally:
        gateway.clean_up()


def ask(client: openai.OpenAI, model: str = "m", **options):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], **options
    )


def paused(seconds: float, tokens: int = 3) -> dict:
    return {"fake": {"pause": seconds, "tokens": tokens}}


class Remote:
    """A worker that nobody but the test starts and ends, always on the same port."""

    def __init__(
        self,
        name: str = "m",
        controls: Iterable[str] = (),
        key: str | None = None,
        port: int | None = None,
    ) -> None:
        """Several on one `port` share its connections."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        told = {"trimtab": {"controls": dict.fromkeys(controls, "")}} if controls else {}
        self._command = [
            *(*FAKE, "--port", str(self.port), "--served-model-name", name),
            *("--additional-config", json.dumps(told), *(("--api-key", key) if key else ())),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.03)
        raise AssertionError("the worker does not listen")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def seen(self) -> dict:
        """What it has been asked."""
        with urllib.request.urlopen(f"{self.url}/fake/seen", timeout=5) as response:
            return json.load(response)
