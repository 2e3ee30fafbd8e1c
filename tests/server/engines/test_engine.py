"""The gateway in front of a real vLLM engine with a tiny model, steered by a real plugin."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from processes import lives, parent_of
from served import FAKE
from serving import ENGINE, START_SECONDS, engine_environment, gateway, get_json

pytestmark = pytest.mark.engine

# 32 answers of 200 tokens, two at once, a step 10 ms or more: half a minute for what a test does meanwhile
LONG = {"n": 32, "max_tokens": 200, "temperature": 1, "stream": True}
WORKER = {
    "args": ENGINE | {"max-num-seqs": 2},
    "processors": ["trimtab_processors:ControlProcessor", "slow_engine:Slow"],
    "env": engine_environment(0) | {"PYTHONPATH": str(Path(__file__).parents[2])},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def url(family, directory):
    (directory / "admin-keys").write_text("chief")
    shutil.copytree(family.control, directory / "packs" / "late")
    config = {
        "controls": {"control": str(family.control)},
        "control_roots": ["packs"],
        "admin_keys_file": "admin-keys",
        "tables": str(directory / "tables"),
        "models": {"a": {"model": str(family.a), **WORKER}, "other": {"model": "org/name", "command": FAKE}},
        "timeouts": {"unresponsive": 5, "probe": 4},
    }
    with gateway(directory, config) as url:
        yield url
        processes = worker_processes(directory)
    assert processes
    assert not any(map(lives, processes))


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def worker_processes(directory: Path) -> list[int]:
    """vLLM's API server and its engine, as its log names them."""
    log = next((directory / "logs").glob("*-a.log")).read_text()
    return sorted({int(pid) for pid in re.findall(r"\((?:APIServer|EngineCore) pid=(\d+)\)", log)})


def ask(client: openai.OpenAI, control=None, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    body = {"control": control, "ignore_eos": True}
    messages = [{"role": "user", "content": "Tell me a story."}]
    return client.chat.completions.create(model="a", messages=messages, extra_body=body, **options)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def sample(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    found = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in found if labels.items() <= s.labels.items())


def test_a_control_steers_the_engine_and_leaves_other_requests_alone(client, url):
    before = sample(url, "trimtab_controlled_requests_total", model_name="a", control="control")
    plain = text_of(ask(client))
    steered = text_of(ask(client, {"name": "control", "strength": 4}))
    assert steered != plain
    assert text_of(ask(client, {"name": "control", "strength": 0})) == plain
    assert text_of(ask(client, control=False)) == plain
    after = sample(url, "trimtab_controlled_requests_total", model_name="a", control="control")
    assert after - before == 1  # strength 0 is no control


def test_a_stream_says_what_one_answer_says(client):
    control = {"name": "control", "strength": 2}
    pieces = [piece.choices[0].delta.content or "" for piece in ask(client, control, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == text_of(ask(client, control))


def test_vllms_own_errors_come_back_as_they_are(client):
    with pytest.raises(openai.BadRequestError, match="temperature must be non-negative") as caught:
        ask(client, temperature=-1)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/completions", {"echo": True, "logprobs": 2}, "echo"),
        ("/completions", {"prompt_logprobs": 2}, "prompt_logprobs"),
        ("/chat/completions", {"prompt_logprobs": 2}, "prompt_logprobs"),
        ("/chat/completions", {"echo": True}, "echo"),
        ("/chat/completions", {"truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ("/responses", {"truncation": "auto"}, "truncation"),
    ],
)
def test_numbers_of_the_uncontrolled_model_are_refused_under_a_control(client, path, asked, param):
    """By the gateway, which names the field that the client wrote; without a control they come."""
    prompts = {"/completions": {"prompt": "Tell me"}, "/responses": {"input": "Tell me"}}
    chat = {"messages": [{"role": "user", "content": "Tell me"}]}
    limit = "max_output_tokens" if path == "/responses" else "max_tokens"
    body = {"model": "a", limit: 4, **prompts.get(path, chat), **asked}
    with pytest.raises(openai.BadRequestError, match="can't be used under a control") as caught:
        client.post(path, body=body | {"control": {"name": "control", "strength": 4}}, cast_to=object)
    assert caught.value.param == param
    assert client.post(path, body=body, cast_to=object)["model"] == "a"


def test_vllms_other_endpoints_answer(url):
    assert get_json(f"{url}/version?model=a")["version"]
    assert get_json(f"{url}/v1/models")["data"][0]["max_model_len"] == 256


def test_a_control_is_loaded_into_the_engine_and_unloaded(client, url, directory):
    """What it says is what the same pack says that was there from the start; lists are summed."""
    chief = client.with_options(api_key="chief")
    place = str(directory / "packs" / "late")
    chief.post("/load_control", body={"control_name": "late", "control_path": place}, cast_to=object)
    listed = {control["id"]: control for control in get_json(f"{url}/v1/controls")["data"]}
    assert listed["late"]["mappings"] == listed["control"]["mappings"]
    assert listed["late"]["mappings"]["a"]["exact"] > 0
    steered = text_of(ask(client, {"name": "control", "strength": 4}))
    assert text_of(ask(client, {"name": "late", "strength": 4})) == steered
    halves = [{"name": name, "strength": 2} for name in ("late", "control")]
    assert text_of(ask(client, halves)) == steered
    chief.post("/unload_control", body={"control_name": "late"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="no control 'late'"):
        ask(client, "late")


def test_a_client_that_goes_away_ends_the_generation_in_the_engine(client, url):
    before = sample(url, "vllm:generation_tokens_total", model_name="a")
    with ask(client, "control", **LONG) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 60
    while sample(url, "vllm:num_requests_running", model_name="a"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    generated = sample(url, "vllm:generation_tokens_total", model_name="a") - before
    assert 0 < generated < LONG["n"] * LONG["max_tokens"]


def test_all_processes_of_a_worker_descend_from_its_launcher(directory):
    server, engine = worker_processes(directory)
    assert parent_of(engine) == server
    assert "trimtab_server.engines.reaper" in Path(f"/proc/{parent_of(server)}/cmdline").read_text()


def test_metrics_are_those_of_the_worker_that_runs_after_the_one_that_was_killed(client, url, directory):
    """Its counters begin anew, its gauges hold nothing of the dead, and each sample stands there once."""
    labels = {"model_name": "a", "control": "control"}
    assert sample(url, "trimtab_controlled_tokens_total", **labels) > 0
    with ask(client, "control", **LONG) as stream:
        next(iter(stream))
        os.kill(worker_processes(directory)[-1], signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
    deadline = time.monotonic() + START_SECONDS
    while not (is_ready(url) and sample(url, "trimtab_gateway_worker_restarts_total", model_name="a")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert sample(url, "trimtab_controlled_tokens_total", **labels) == 0
    assert sample(url, "trimtab_blocks_in_use", **labels) == 0
    ask(client, "control", max_tokens=12)
    assert sample(url, "trimtab_controlled_tokens_total", **labels) == 12
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = [line.rpartition(" ")[0] for line in response.read().decode().splitlines() if line[0] != "#"]
    assert len(lines) == len({*lines})


def test_a_worker_whose_engine_hangs_is_started_again(client, url, directory):
    """vLLM's own `/health` does not tell of it."""
    before = hangs(url)
    log = next((directory / "logs").glob("*-a.log")).read_text()
    pid = int(re.findall(r"\(EngineCore pid=(\d+)\)", log)[-1])
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(openai.APIStatusError, match="The replica of 'a' hung and is started again"):
        ask(client, max_tokens=12)
    assert client.chat.completions.create(model="other", messages=[]).choices
    deadline = time.monotonic() + START_SECONDS
    while hangs(url) == before or not is_ready(url):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not lives(pid)
    assert text_of(ask(client, {"name": "control", "strength": 4})) != text_of(ask(client))
    assert sample(url, "trimtab_gateway_worker_restarts_total", model_name="other") == 0


def test_a_worker_whose_engine_is_in_a_long_queue_is_left_alone(client, url):
    """32 answers, two at once, take much longer than `timeouts.unresponsive`."""
    before = sample(url, "trimtab_gateway_worker_restarts_total", model_name="a")
    began = time.monotonic()
    with ask(client, "control", **LONG) as stream:
        for _ in stream:
            if time.monotonic() - began > 12:
                break
    assert time.monotonic() - began > 12
    assert sample(url, "trimtab_gateway_worker_restarts_total", model_name="a") == before


def hangs(url: str) -> float:
    return sample(url, "trimtab_gateway_worker_restarts_total", model_name="a", cause="unresponsive")


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=30) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return False
