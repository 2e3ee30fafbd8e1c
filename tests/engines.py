"""Real vLLM servers without a gateway, for tests: stock ones, and ones with the plugin."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serving import STOP_SECONDS, free_port, wait_until_answers

PLUGIN = ("--logits-processors", "trimtab_processors:ControlProcessor")
V1, V2 = "v1", "v2"
"""vLLM's model runners."""
TRITON_ON_CPUS = Path(__file__).resolve().with_name("triton_on_cpus")
HOT = (
    *("--middleware", "trimtab_processors.endpoints.ControlEndpoints"),
    *("--worker-extension-cls", "trimtab_processors.worker_extension.ControlWorker"),
)
"""What a server needs for controls that come and go while it runs."""


@dataclass(frozen=True)
class Engine:
    """A server under test."""

    url: str

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 before the first of them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextlib.contextmanager
def engine(
    model: Path,
    directory: Path,
    *args: str,
    plugin: Mapping[str, Any] | None = None,
    runner: str = V1,
    cores: str = "0",
    variables: Mapping[str, str] | None = None,
) -> Iterator[Engine]:
    """Serve `model` as `m` until the block ends, with the plugin where it has settings.

    The V2 runner schedules asynchronously, and has its kernels interpreted.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "m", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--async-scheduling" if runner == V2 else "--no-async-scheduling",),
        *("--logprobs-mode", "processed_logprobs", *args),
    ]
    if plugin is not None:
        command += [*PLUGIN, "--additional-config", json.dumps({"trimtab": plugin})]
    with tempfile.TemporaryDirectory() as metrics, (directory / "engine.log").open("w") as log:
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "PROMETHEUS_MULTIPROC_DIR": metrics,
            "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == V2)),
            **({"TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON_ON_CPUS)} if runner == V2 else {}),
            **(variables or {}),
        }
        environment.pop("OMP_NUM_THREADS", None)
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=directory
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_answers(f"{url}/health", process, directory / "engine.log")
            yield Engine(url)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)
