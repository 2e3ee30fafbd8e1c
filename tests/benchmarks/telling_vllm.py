"""As `fake_vllm`, but what it says tells who was asked what, under which control.

`TELLING_FAULT` in its environment makes it do wrong: `mixed` gives every tenth stream the words of the one
before it; `broken` answers every tenth request with 500; `bare` refuses every tenth without an error object.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fake_vllm

FAULT = os.environ.get("TELLING_FAULT", "")
BODIES = {"broken": (500, {"error": {"message": "no"}}), "bare": (400, {"detail": "no"})}
turns = itertools.count(1)
plain_answer = fake_vllm._answer
last = ["nothing"]


def words_of(payload: dict[str, Any]) -> list[str]:
    """Three words that another model, prompt or control would not have."""
    asked = [payload["model"], payload.get("messages"), payload.get("vllm_xargs")]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return [digest[i : i + 8] for i in (0, 8, 16)]


async def stream(request: web.Request, payload: dict[str, Any], _: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    words = words_of(payload)
    said, last[:] = (last[:] if FAULT == "mixed" and next(turns) % 10 == 0 else words), words
    for word in said:
        event = {"choices": [{"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}]}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


async def answer(request: web.Request, payload: dict[str, Any], orders: dict[str, Any]) -> web.Response:
    if FAULT in BODIES and next(turns) % 10 == 0:
        status, body = BODIES[FAULT]
        return web.json_response(body, status=status)
    return await plain_answer(request, payload, orders)


if __name__ == "__main__":
    fake_vllm._stream, fake_vllm._answer = stream, answer
    fake_vllm.main()
