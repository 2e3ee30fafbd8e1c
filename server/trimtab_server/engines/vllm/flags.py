"""vLLM's flags and environment variables that Trimtab sets itself, and the plugin's classes.

This module imports nothing of the server, so that the configuration can check what it declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Runner = Literal["v1", "v2"]
CONTROL_PROCESSORS: Mapping[Runner, str] = {
    "v1": "trimtab_processors.vllm_v1:ControlProcessor",
    "v2": "trimtab_processors.vllm_v2:ControlProcessor",
}
"""The plugin for each of vLLM's model runners."""
CONTROL_PROCESSOR = CONTROL_PROCESSORS["v1"]
"""Its name in a model's list of processors, whatever the runner."""
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
RESERVED_FLAGS = frozenset(
    {
        *("model", "served-model-name", "uds", "host", "port", "logits-processors", "additional-config"),
        *("config", "headless", "grpc", "root-path", "api-key", "api-server-count", "worker-extension-cls"),
        *("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs"),
    }
)
"""Flags of vLLM that Trimtab sets itself, or that would put the replica out of its reach."""
