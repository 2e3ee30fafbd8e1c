"""Every example as a newcomer runs it: a process of its own against a gateway on a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from served import Served, served
from serving import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CLIENTS = ROOT / ".venv-clients" / "bin"
KEY = f"sk-{secrets.token_urlsafe(24)}"
# Nothing of the tester's own: neither keys nor a model, a control or a proxy.
ENVIRONMENT = {"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
OFF, ON = None, ("manners", 0.7)
WAYS = ["off", "body", "header", "alias"]
SDKS = ["openai_sync.py", "openai_stream.py", "anthropic_messages.py", "langchain_chat.py", "litellm_sdk.py"]
OTHERS = ["openai_async.py", "litellm_proxy.py", "litellm_proxy.yaml", "curl.sh"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, family) -> Served:
    config = {"controls": {"manners": str(family.control)}, "models": {"a": {}}}
    with served(tmp_path_factory.mktemp("examples"), **config) as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="module")
def proxy(gateway, tmp_path_factory):
    """LiteLLM's, with the example's configuration."""
    port = free_port()
    environment = {
        **ENVIRONMENT,
        "GATEWAY_BASE": f"{gateway.url}/v1",
        "GATEWAY_KEY": "none",
        "LITELLM_MASTER_KEY": KEY,
    }
    command = [CLIENTS / "litellm", "--config", EXAMPLES / "litellm_proxy.yaml", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("proxy") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=output, stderr=output
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
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"LiteLLM's proxy did not start:\n{log.read_text()[-3000:]}")


def run(name: str, **variables: str) -> list[str]:
    """Run an example; returns the lines that it printed."""
    interpreter = CLIENTS / "python" if name.endswith(".py") else "sh"
    done = subprocess.run(
        [interpreter, EXAMPLES / name],
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def labelled(lines: list[str]) -> dict[str, str]:
    """What stands behind each line's label."""
    return {label: text.strip() for label, _, text in (line.partition(":") for line in lines)}


@pytest.fixture
def told(gateway):
    """The control and its strength in each request of this test that has reached the worker."""
    before = len(gateway.seen("a")["requests"])

    def told() -> list[tuple[str, float] | None]:
        bodies = [request["body"] for request in gateway.seen("a")["requests"][before:]]
        xargs = [body.get("vllm_xargs") for body in bodies]
        return [x and (x["trimtab_control"], x["trimtab_strength"]) for x in xargs]

    return told


@pytest.mark.parametrize("name", SDKS)
def test_an_sdk_asks_without_control_and_with_it_in_the_body_a_header_and_an_alias(gateway, told, name):
    printed = labelled(run(name, BASE_URL=gateway.url))
    answer = "t0 t1 t2" if name == "openai_stream.py" else "one two"
    assert {way: printed[way] for way in WAYS} == dict.fromkeys(WAYS, answer)
    assert told()[:4] == [OFF, ON, ON, ON]


def test_an_example_asks_for_the_model_and_the_control_that_the_environment_names(gateway):
    variables = {"BASE_URL": gateway.url, "MODEL": "a:off", "CONTROL": "other"}
    with pytest.raises(AssertionError, match="'a' has no control 'other'"):
        run("openai_sync.py", **variables)
    assert gateway.seen("a")["requests"][-1]["body"]["model"] == "a"


def test_the_first_example_says_what_was_applied(gateway):
    assert run("openai_sync.py", BASE_URL=gateway.url)[-1] == "applied: manners=1.0"


def test_the_asynchronous_example_asks_with_several_strengths_at_once(gateway, told):
    strengths = [0.0, 0.5, 0.7]
    assert run("openai_async.py", BASE_URL=gateway.url) == [f"{strength}: one two" for strength in strengths]
    assert sorted(told()) == [("manners", strength) for strength in strengths]


def test_curl_says_it_in_every_way_and_streams(gateway, told):
    *answers, stream = "\n".join(run("curl.sh", BASE_URL=gateway.url)).split("\n", 4)
    assert [json.loads(answer)["choices"][0]["message"]["content"] for answer in answers] == ["one two"] * 4
    assert stream.count("data: {") == 3
    assert told() == [OFF, ON, ON, ON, ON]


def test_litellms_proxy_passes_every_way_on_and_has_a_controlled_model_of_its_own(gateway, proxy, told):
    printed = labelled(run("litellm_proxy.py", PROXY_URL=proxy, LITELLM_MASTER_KEY=KEY))
    assert printed == dict.fromkeys([*WAYS, "named"], "one two")
    assert told() == [OFF, ON, ON, ON, ON]


def test_every_example_is_tried_and_documented():
    examples = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert examples == {*SDKS, *OTHERS}
    page = (ROOT / "docs" / "clients.md").read_text()
    assert [name for name in examples if f"`{name}`" not in page] == []
