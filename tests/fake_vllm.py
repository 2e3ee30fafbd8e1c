"""A server with vLLM's interface and the plugin's, and no model; as a process of its own or inside a test.

What it does on a request stands in the request's field `fake`; what it has seen, `GET /fake/seen` tells.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from aiohttp import web

SEEN = web.AppKey("seen", dict)
NAME = web.AppKey("name", str)
CONTROLS = web.AppKey("controls", dict)
ADMIN_KEY = web.AppKey("admin_key", str)
MAPPING = {"strategy": "pm-mined", "exact": 7, "longest_target_token": 9}
INSTANCE = web.AppKey("instance", str)
ENGINE = web.AppKey("engine", dict)
"""`state` is "answers", "computes" or "hangs"."""
METRICS = """\
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="{name}"}} 7.0
# HELP http_requests_total Total number of requests by method, status and handler.
# TYPE http_requests_total counter
http_requests_total{{handler="/v1/completions",method="POST",status="2xx"}} 3.0
# HELP http_request_duration_seconds Duration of HTTP requests in seconds
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{{handler="/x",le="0.1"}} 1.0
http_request_duration_seconds_bucket{{handler="/x",le="+Inf"}} 2.0
http_request_duration_seconds_count{{handler="/x"}} 2.0
http_request_duration_seconds_sum{{handler="/x"}} 0.5
"""


def make_app(
    name: str, controls: Mapping[str, str] | None = None, key: str | None = None, admin_key: str = ""
) -> web.Application:
    """A server of the model `name`; without `controls`, name to pack, one without the plugin."""
    app = web.Application(client_max_size=2**30, middlewares=[] if key is None else [_behind(key)])
    app[NAME] = name
    app.router.add_get("/v1/controls", list_controls)
    if controls is not None:
        app[CONTROLS] = dict(controls)
        app.router.add_post("/v1/load_control", load_control)
        app.router.add_post("/v1/unload_control", unload_control)
    app[ADMIN_KEY] = admin_key
    app[INSTANCE] = secrets.token_hex(8)
    app[ENGINE] = {"state": "answers"}
    app[SEEN] = {"requests": [], "aborted": 0, "changes": []}
    app.router.add_get("/health", health)
    app.router.add_get("/health/engine", engine_health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/fake/seen", seen)
    app.router.add_post("/fake/text", text)
    app.router.add_post("/v1/chat/completions", generate)
    app.router.add_post("/v1/completions", generate)
    app.router.add_post("/v1/responses", generate)
    app.router.add_post("/v1/messages", generate)
    app.router.add_route("*", "/{path:.*}", echo)
    return app


async def health(_: web.Request) -> web.Response:
    return web.Response()


async def engine_health(request: web.Request) -> web.Response:
    state = request.app[ENGINE]["state"]
    return web.json_response({"answers": state == "answers", "busy": 0.9 if state == "computes" else 0.02})


async def models(request: web.Request) -> web.Response:
    data = [{"id": request.app[NAME], "object": "model", "owned_by": "vllm", "max_model_len": 256}]
    return web.json_response({"object": "list", "data": data})


async def list_controls(request: web.Request) -> web.Response:
    if CONTROLS not in request.app:
        raise web.HTTPNotFound
    data = [
        {
            "id": name,
            "object": "control",
            "root": root,
            "mapping": {"strategy": "pm-mined", "exact": 7, "longest_target_token": 9},
        }
        for name, root in request.app[CONTROLS].items()
    ]
    return web.json_response({"object": "list", "data": data, "instance": request.app[INSTANCE]})


async def load_control(request: web.Request) -> web.Response:
    """A pack whose directory holds a file `slow` takes a while, one with `unusable` is refused."""
    body = await _change(request, "load")
    name, place = body["control_name"], Path(body["control_path"])
    if (place / "slow").exists():
        await asyncio.sleep(0.5)
    if name in request.app[CONTROLS] or (place / "unusable").exists():
        message = {"message": f"{name} can't be loaded here", "type": "BadRequestError"}
        return web.json_response({"error": message}, status=400)
    request.app[CONTROLS][name] = str(place)
    return web.json_response({"status": "loaded"})


async def unload_control(request: web.Request) -> web.Response:
    body = await _change(request, "unload")
    if request.app[CONTROLS].pop(body["control_name"], None) is None:
        return web.json_response({"error": {"message": "no such control"}}, status=404)
    return web.json_response({"status": "unloaded"})


async def _change(request: web.Request, what: str) -> dict[str, Any]:
    if request.headers.get("x-trimtab-admin-key", "") != request.app[ADMIN_KEY]:
        raise web.HTTPForbidden
    body = await request.json()
    request.app[SEEN]["changes"].append([what, body["control_name"]])
    return body


def _behind(key: str) -> Any:
    """vLLM's `--api-key`, which guards what is below /v1."""

    @web.middleware
    async def require_key(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("authorization")
        if request.path.startswith("/v1") and given != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return require_key


async def metrics(request: web.Request) -> web.Response:
    return web.Response(text=METRICS.format(name=request.app[NAME]))


async def seen(request: web.Request) -> web.Response:
    return web.json_response(request.app[SEEN])


async def text(_: web.Request) -> web.Response:
    return web.Response(text="no JSON")


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    if "digest" in request.query:
        return web.json_response({"sha256": sha256(body).hexdigest(), "bytes": len(body)})
    answer = {
        "method": request.method,
        "target": request.raw_path,
        "headers": {k.lower(): v for k, v in request.headers.items()},
        "body": body.decode("latin-1"),
    }
    return web.json_response(answer, status=202, headers={"x-from-worker": request.app[NAME]})


async def generate(request: web.Request) -> web.StreamResponse:
    payload = await request.json()
    request.app[SEEN]["requests"].append({"headers": dict(request.headers), "body": payload})
    orders = payload.get("fake", {})
    request.app[ENGINE]["state"] = orders.get("engine", request.app[ENGINE]["state"])
    try:
        await asyncio.sleep(orders.get("delay", 0))
        if orders.get("die") == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.get("hang_up") == "before":
            request.transport.abort()
        if refusal := orders.get("refusal"):
            return web.json_response(refusal["body"], status=refusal["status"])
        return await (_stream if payload.get("stream") else _answer)(request, payload, orders)
    except (asyncio.CancelledError, ConnectionError):
        request.app[SEEN]["aborted"] += 1
        raise


async def _answer(request: web.Request, payload: dict[str, Any], __: dict[str, Any]) -> web.Response:
    if request.path == "/v1/messages":
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": payload.get("model"),
            "content": [{"type": "text", "text": "one two"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 2},
        }
        return web.json_response(message)
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": payload.get("model"),
        "system_fingerprint": str(os.getpid()),
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "one two"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    return web.json_response(body)


async def _stream(
    request: web.Request, payload: dict[str, Any], orders: dict[str, Any]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for i in range(orders.get("tokens", 3)):
        delta = {"index": 0, "delta": {"content": f"t{i} "}, "finish_reason": None}
        chunk = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": payload.get("model"),
            "system_fingerprint": str(os.getpid()),
            "choices": [delta],
        }
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if orders.get("die") == "midway":
            await asyncio.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.get("hang_up") == "midway":
            request.transport.abort()
        await asyncio.sleep(orders.get("pause", 0))
    await response.write(b"data: [DONE]\n\n")
    return response


def main() -> None:
    """Take vLLM's flags; the environment says how to misbehave."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--additional-config", type=json.loads, default={})
    parser.add_argument("--served-model-name")
    parser.add_argument("--model")
    known, _ = parser.parse_known_args()
    print(f"fake server {os.getpid()}", *sys.argv[1:], flush=True)
    if os.environ.get("FAKE_FAIL"):
        print("no such luck", file=sys.stderr, flush=True)
        sys.exit(3)
    if os.environ.get("FAKE_CHILD"):
        # As vLLM has its engine: a process that would live on without its parent. It does not heed SIGTERM.
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", stubborn])
        print(f"child {child.pid}", flush=True)
    time.sleep(float(os.environ.get("FAKE_START_SECONDS", "0")))
    plugin = known.additional_config.get("trimtab")
    controls = None if plugin is None else plugin.get("controls", {})
    admin_key = os.environ.get("TRIMTAB_ADMIN_KEYS", "")
    app = make_app(known.served_model_name, controls, known.api_key, admin_key)
    place = (
        {"path": known.uds} if known.uds else {"host": "127.0.0.1", "port": known.port, "reuse_port": True}
    )
    web.run_app(app, **place, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
