"""Every example as a newcomer runs it: a process of its own against a gateway on a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from served import Served, served
from serving import ENGINE, engine_environment, free_port
from serving import gateway as gateway_of_engines

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


@pytest.fixture
def answered(gateway):
    """What the header `X-Trimtab-Control` of each answer in this test said: the log repeats it."""
    before = len(gateway.log)

    def answered(count: int) -> list[str]:
        def found() -> list[str]:
            return re.findall(r" model=a control=([^-\s]\S*) status=200 ", gateway.log[before:])

        gateway.wait_for(lambda: len(found()) >= count, seconds=5)
        return found()[:count]

    return answered


@pytest.mark.parametrize("name", SDKS)
def test_an_sdk_asks_without_control_and_with_it_in_the_body_a_header_and_an_alias(
    gateway, told, answered, name
):
    printed = labelled(run(name, BASE_URL=gateway.url))
    answer = "t0 t1 t2" if name == "openai_stream.py" else "one two"
    assert {way: printed[way] for way in WAYS} == dict.fromkeys(WAYS, answer)
    assert told()[:4] == [OFF, ON, ON, ON]
    assert answered(4) == ["off", *["manners=0.7"] * 3]


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


def test_litellms_proxy_says_what_was_applied(gateway, proxy):
    body = {"model": "a:manners=0.7", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(f"{proxy}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["llm_provider-x-trimtab-control"] == "manners=0.7"


@pytest.fixture(scope="module")
def greedy(tmp_path_factory, family) -> Path:
    """A target whose own settings are greedy: the examples say nothing of temperature."""
    place = tmp_path_factory.mktemp("greedy") / "a"
    shutil.copytree(family.a, place)
    settings = place / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.0}))
    return place


@pytest.mark.engine
def test_on_a_real_engine_every_way_of_asking_gives_the_same_other_answer(tmp_path, family, greedy):
    engine = {"model": str(greedy), "args": ENGINE, "env": engine_environment(0)}
    config = {"controls": {"manners": str(family.control)}, "models": {"a": engine}}
    with gateway_of_engines(tmp_path, config) as url:
        for name in ("openai_sync.py", "openai_stream.py", "anthropic_messages.py"):
            printed = "\n".join(run(name, BASE_URL=url))
            parts = re.split(r"^(off|body|header|alias|applied): *", printed, flags=re.MULTILINE)
            said = dict(zip(parts[1::2], parts[2::2], strict=True))
            assert said["off"].strip() != said["body"].strip() != ""
            assert said["body"].strip() == said["header"].strip() == said["alias"].strip()


def test_every_example_is_tried_and_documented():
    examples = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert examples == {*SDKS, *OTHERS}
    page = (ROOT / "docs" / "clients.md").read_text()
    assert [name for name in examples if f"`{name}`" not in page] == []
