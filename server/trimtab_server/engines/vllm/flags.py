"""vLLM's flags and environment variables that Trimtab sets itself, and the plugin's classes.

This module imports nothing of the server, so that the configuration can check what it declares.
"""

from __future__ import annotations

from typing import Literal, get_args

Runner = Literal["v1", "v2"]
CONTROL_PROCESSOR = "trimtab_processors:ControlProcessor"
"""The plugin, for either of vLLM's model runners."""
RUNNER_PROCESSORS = tuple(f"trimtab_processors.vllm_{runner}:ControlProcessor" for runner in get_args(Runner))
"""Its names for one runner, which a configuration may still have."""
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
RESERVED_FLAGS = frozenset(
    {
        *("model", "served-model-name", "uds", "host", "port", "logits-processors", "additional-config"),
        *("config", "headless", "grpc", "root-path", "api-key", "api-server-count", "worker-extension-cls"),
        *("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs"),
    }
)
"""Flags of vLLM that Trimtab sets itself, or that would put the replica out of its reach."""
