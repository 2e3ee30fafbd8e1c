"""How a replica is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trimtab_server.config.schema import load_settings
from trimtab_server.engines.vllm.command import replica_command, replica_environment
from trimtab_server.engines.vllm.flags import CONTROL_PROCESSOR


@pytest.fixture
def command(write_config):
    """The command line of a model with these settings."""

    def command(controls=None, **model):
        config = {"models": {"m": {"model": "org/name", **model}}, "controls": controls or {}}
        settings = load_settings(write_config(config))
        return replica_command(settings, "m", settings.models["m"].replicas[0], Path("/run/http"))

    return command


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_it_is_vllms_own_server_on_a_unix_socket(command):
    words = command()
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of(words, "--model") == "org/name"
    assert value_of(words, "--served-model-name") == "m"
    assert value_of(words, "--uds") == "/run/http"
    assert "--logprobs-mode=processed_logprobs" in words


def test_the_plugin_is_told_of_the_models_controls(command, tmp_path):
    words = command(controls={"one": "org/one", "two": "org/two"})
    assert value_of(words, "--logits-processors") == CONTROL_PROCESSOR
    assert json.loads(value_of(words, "--additional-config")) == {
        "trimtab": {"controls": {"one": "org/one", "two": "org/two"}, "tables": str(tmp_path / "tables")}
    }
    assert "--no-async-scheduling" in words


def test_the_plugins_own_options_join_them(command):
    words = command(controls={"c": "org/c"}, plugin={"neutral": False})
    told = json.loads(value_of(words, "--additional-config"))["trimtab"]
    assert (told["neutral"], told["controls"]) == (False, {"c": "org/c"})
    assert "cache_bytes" not in told


def test_without_controls_the_plugin_stays_out(command):
    words = command()
    assert "--logits-processors" not in words
    assert "--additional-config" not in words
    assert "--no-async-scheduling" not in words


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, True),
        ({"command": ["other"]}, False),
        ({"command": ["other"], "controls": {"c": "org/c"}}, True),
    ],
)
def test_a_program_that_has_the_plugin_is_asked_how_its_engine_does(command, more, asked):
    assert ("trimtab_processors.liveness.EngineHealth" in command(**more)) == asked


def test_processors_stand_in_the_order_that_is_configured(command):
    words = command(controls={"c": "org/c"}, processors=["a.b:C", CONTROL_PROCESSOR])
    at = words.index("--logits-processors")
    assert words[at + 1 : at + 3] == ["a.b:C", CONTROL_PROCESSOR]


def test_the_v2_model_runner_has_a_plugin_of_its_own_and_keeps_asynchronous_scheduling(command):
    words = command(controls={"c": "org/c"}, runner="v2")
    assert value_of(words, "--logits-processors") == CONTROL_PROCESSOR
    assert json.loads(value_of(words, "--additional-config"))["trimtab"]["controls"] == {"c": "org/c"}
    assert "--no-async-scheduling" not in words


def test_others_processors_need_no_control(command):
    assert value_of(command(processors=["a.b:C"]), "--logits-processors") == "a.b:C"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_len": 256}, ["--max-model-len=256"]),
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"gpu-memory-utilization": 0.5}, ["--gpu-memory-utilization=0.5"]),
        ({"middleware": ["a.b", "c.d"]}, ["--middleware", "a.b", "c.d"]),
        ({"hf-overrides": {"a": [1]}}, ['--hf-overrides={"a": [1]}']),
        ({"chat-template": "-x"}, ["--chat-template=-x"]),
        ({"compilation-config.mode": 3}, ["--compilation-config.mode=3"]),
    ],
)
def test_flags_go_by_their_own_names(command, args, words):
    line = command(args=args)
    at = line.index(words[0])
    assert line[at : at + len(words)] == words


def test_what_is_configured_stands_before_trimtabs_defaults(command):
    words = command(controls={"c": "org/c"}, args={"logprobs_mode": "raw_logits", "async-scheduling": True})
    assert "--logprobs-mode=raw_logits" in words
    assert "--logprobs-mode=processed_logprobs" not in words
    assert "--async-scheduling" in words


def test_another_program_may_stand_before_the_flags(command):
    assert command(command=["numactl", "-N0", "python", "-m", "x"])[:6] == [
        *("numactl", "-N0", "python", "-m", "x", "--logprobs-mode=processed_logprobs")
    ]


@pytest.fixture
def environment(write_config):
    """The environment of the last replica of a model with these settings."""

    def environment(**model):
        settings = load_settings(write_config({"models": {"m": {"model": "x", **model}}}))
        return replica_environment(settings, "m", settings.models["m"].replicas[-1], Path("/run/0"))

    return environment


def test_the_environment_is_the_gateways_with_the_models_own(environment, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    made = environment(env={"VLLM_NO_USAGE_STATS": "0", "OWN": "x", "PROMETHEUS_MULTIPROC_DIR": "/elsewhere"})
    assert (made["HF_HOME"], made["OWN"]) == ("/models", "x")
    assert (made["VLLM_NO_USAGE_STATS"], made["DO_NOT_TRACK"]) == ("0", "1")
    assert (made["PROMETHEUS_MULTIPROC_DIR"], made["VLLM_RPC_BASE_PATH"]) == ("/run/0/metrics", "/run/0")


def test_the_runner_stands_in_the_environment(environment):
    assert environment()["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert environment(runner="v2")["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_no_worker_gets_the_keys_of_the_gateway_or_of_a_worker_elsewhere(environment, monkeypatch):
    for name in ("TRIMTAB_API_KEYS", "TRIMTAB_ADMIN_KEYS", "VLLM_API_KEY", "ELSEWHERE"):
        monkeypatch.setenv(name, "secret")
    elsewhere = {"url": "http://elsewhere", "key_variable": "ELSEWHERE"}
    assert "secret" not in environment(replicas=[elsewhere, {}]).values()


def test_a_replica_has_flags_and_environment_of_its_own_before_the_models(command, environment):
    model = {"args": {"seed": 1, "max-model-len": 256}, "env": {"A": "model", "B": "model"}}
    model["replicas"] = [{"args": {"seed": 2}, "env": {"B": "replica"}}]
    words = command(**model)
    assert [word for word in words if word.startswith("--seed")] == ["--seed=2"]
    assert "--max-model-len=256" in words
    made = environment(**model)
    assert (made["A"], made["B"]) == ("model", "replica")


@pytest.mark.parametrize("devices", [[0, 3], ["0", "3"]])
def test_a_replica_has_devices_and_cores_of_its_own(environment, devices):
    made = environment(replicas=[{"devices": devices, "cpus": "0-3"}], env={"CUDA_VISIBLE_DEVICES": "7"})
    assert (made["CUDA_VISIBLE_DEVICES"], made["VLLM_CPU_OMP_THREADS_BIND"]) == ("0,3", "0-3")


def test_a_replica_without_devices_leaves_them_as_they_are(environment, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert environment()["CUDA_VISIBLE_DEVICES"] == "7"
