"""Print the routes of vLLM's server with every flag on, as JSON: [path, method or "WEBSOCKET"] each."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Of this process alone: the test that starts it imports it, too."""


def main() -> None:
    os.environ |= ENVIRONMENT
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers
    from vllm.entrypoints.serve.sagemaker.api_router import sagemaker_standards_bootstrap

    flags = dict.fromkeys(
        ("enable_fault_tolerance", "enable_scale_out", "enable_tokenizer_info_endpoint", "tokens_only"), True
    )
    args = Namespace(**flags, profiler_config=None)
    app = FastAPI()
    app.state.args = args
    register_api_routers(args, app, ("generate", "transcription", "realtime", "render"), None)
    app = sagemaker_standards_bootstrap(app)
    found = [
        [route.path, method]
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ["WEBSOCKET"])
    ]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
