"""Every example as a newcomer runs it: a process of its own against a gateway on a real socket."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from served import Served, served
from serving import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CLIENTS = ROOT / ".venv-clients" / "bin"
KEY = f"sk-{secrets.token_urlsafe(24)}"
OFF, ON = None, ("manners", 0.7)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, family) -> Served:
    config = {"controls": {"manners": str(family.control)}, "models": {"a": {}}}
    with served(tmp_path_factory.mktemp("examples"), **config) as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="module")
def proxy(gateway, tmp_path_factory):
    """LiteLLM's, with the example's configuration."""
    port = free_port()
    environment = os.environ | {
        "GATEWAY_BASE": f"{gateway.url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks for a list of prices
        "LITELLM_MASTER_KEY": KEY,
    }
    command = [str(CLIENTS / "litellm"), "--config", str(EXAMPLES / "litellm_proxy.yaml")]
    log = tmp_path_factory.mktemp("proxy") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health/liveliness", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"LiteLLM's proxy did not start:\n{log.read_text()[-3000:]}")


def told(gateway: Served, count: int) -> list[tuple[str, float] | None]:
    """Of the last requests that reached the worker, the control and its strength."""
    bodies = [request["body"] for request in gateway.seen("a")["requests"][-count:]]
    xargs = [body.get("vllm_xargs") or {} for body in bodies]
    return [(x["trimtab_control"], x["trimtab_strength"]) if "trimtab_control" in x else None for x in xargs]


def run(name: str, **variables: str) -> str:
    interpreter = [str(CLIENTS / "python")] if name.endswith(".py") else ["sh"]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"} | variables
    done = subprocess.run(
        [*interpreter, str(EXAMPLES / name)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "applied"),
    [
        ("openai_sync.py", [OFF, ON, ON, ON, ("manners", 1.0)]),
        ("openai_stream.py", [OFF, ON]),
        ("anthropic_messages.py", [OFF, ON, ON]),
        ("langchain_chat.py", [OFF, ON]),
        ("litellm_sdk.py", [OFF, ON, ON, ON]),
        ("curl.sh", [OFF, ON, ON, ON, ON]),
    ],
)
def test_an_example_asks_with_and_without_control(gateway, name, applied):
    printed = run(name, BASE_URL=gateway.url)
    assert told(gateway, len(applied)) == applied
    assert printed.count("one two") + printed.count("t0 ") >= len(applied) - 1


def test_the_asynchronous_example_asks_with_several_strengths_at_once(gateway):
    printed = run("openai_async.py", BASE_URL=gateway.url)
    assert {pair[1] for pair in told(gateway, 3)} == {0.0, 0.5, 0.7}
    assert [line.partition(":")[0] for line in printed.splitlines()] == ["0.0", "0.5", "0.7"]


def test_litellms_proxy_passes_a_control_on(gateway, proxy):
    printed = run("litellm_proxy.py", PROXY_URL=proxy, LITELLM_MASTER_KEY=KEY)
    assert told(gateway, 3) == [OFF, ON, ON]
    assert printed.count("one two") == 3


def test_every_example_is_tried():
    tried = {"openai_async.py", "litellm_proxy.py", "litellm_proxy.yaml"} | {
        mark.args[1][i][0]
        for mark in test_an_example_asks_with_and_without_control.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert tried == {path.name for path in EXAMPLES.iterdir() if path.is_file()}
