"""How a replica is started: vLLM's command line and environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab_processors.settings import KEY as PLUGIN_KEY
from trimtab_processors.settings import PluginSettings
from trimtab_server.config.schema import ModelSettings, Settings
from trimtab_server.config.sections import ReplicaSettings
from trimtab_server.engines.vllm.flags import CONTROL_PROCESSOR, RUNNER_VARIABLE

VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
_DEFAULT_FLAGS: Mapping[str, Any] = {
    # Clients see the distribution that they were sampled from.
    "logprobs-mode": "processed_logprobs",
    # The gateway has a log line of its own for each request.
    "disable-uvicorn-access-log": True,
}
_CONTROL_FLAGS: Mapping[str, Mapping[str, Any]] = {
    # The plugin reads each sampled token before the next step.
    "v1": {"async-scheduling": False},
    "v2": {},
}
_ENDPOINTS = (
    *("--middleware", "trimtab_processors.endpoints.ControlEndpoints"),
    *("--worker-extension-cls", "trimtab_processors.worker_extension.ControlWorker"),
)
"""What lists the replica's controls, and loads and unloads them."""
_LIVENESS = ("--middleware", "trimtab_processors.liveness.EngineHealth")
"""What tells an engine that hangs from one that is busy."""
_DEFAULT_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
PRIVATE_VLLM_KEY = "VLLM_API_KEY"
_PRIVATE_PREFIX = "TRIMTAB_"
"""Of the gateway's own variables, with keys and passwords among them."""


def replica_command(settings: Settings, name: str, replica: ReplicaSettings, socket: Path) -> list[str]:
    """The command line of a replica that serves the model `name` on the unix socket `socket`."""
    model = settings.models[name]
    controls = settings.controls_of(name)
    roots = settings.control_roots
    controlled = settings.can_steer(name)
    processors = _processors(model, controlled=controlled)
    defaults = {**_DEFAULT_FLAGS, **(_CONTROL_FLAGS[model.runner] if controlled else {})}
    command = [*(model.command or VLLM), *_flags({**defaults, **model.args, **replica.args})]
    # Last, since the last of two equal flags wins, whatever abbreviation the first one is written in.
    command += ["--model", str(model.model), "--served-model-name", name, "--uds", str(socket)]
    if processors:
        command += ["--logits-processors", *processors]
    if controlled or model.command is None:  # another program may have no plugin
        command += _LIVENESS
    if controlled:
        told = {"controls": controls, "tables": settings.tables} | ({"control_roots": roots} if roots else {})
        plugin = model.plugin.model_copy(update=told)
        command += ["--additional-config", json.dumps({PLUGIN_KEY: _given(plugin)}), *_ENDPOINTS]
    return command


def replica_environment(
    settings: Settings, name: str, replica: ReplicaSettings, directory: Path
) -> dict[str, str]:
    """The environment of a replica of the model `name` whose own files stand in `directory`."""
    model = settings.models[name]
    private = {PRIVATE_VLLM_KEY, *_key_variables(settings)}
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in private and not key.startswith(_PRIVATE_PREFIX)
    }
    own = {
        "PROMETHEUS_MULTIPROC_DIR": str(directory / "metrics"),
        "VLLM_RPC_BASE_PATH": str(directory),
        RUNNER_VARIABLE: str(int(model.runner == "v2")),
    }
    return {**inherited, **_DEFAULT_ENVIRONMENT, **model.env, **replica.env, **_hardware(replica), **own}


def _key_variables(settings: Settings) -> Iterator[str]:
    """Where the keys of replicas elsewhere are."""
    for model in settings.models.values():
        for replica in model.replicas:
            yield from replica.key_variables.values()


def _hardware(replica: ReplicaSettings) -> dict[str, str]:
    devices = None if replica.devices is None else ",".join(map(str, replica.devices))
    variables = {"CUDA_VISIBLE_DEVICES": devices, "VLLM_CPU_OMP_THREADS_BIND": replica.cpus}
    return {name: value for name, value in variables.items() if value is not None}


def _given(plugin: PluginSettings) -> dict[str, Any]:
    return plugin.model_dump(mode="json", exclude_unset=True)


def _processors(model: ModelSettings, *, controlled: bool) -> list[str]:
    """The model's processors; ours only if it has something to do."""
    return [name for name in model.processors if controlled or name != CONTROL_PROCESSOR]


def _flags(args: Mapping[str, Any]) -> Iterator[str]:
    for flag, value in args.items():
        match value:
            case True:
                yield f"--{flag}"
            case False:
                yield f"--no-{flag}"
            case list():
                yield from (f"--{flag}", *map(_text, value))
            case _:
                yield f"--{flag}={_text(value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
