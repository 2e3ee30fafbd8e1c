"""How long a prompt can be that a replica takes, from what it says of itself."""

from __future__ import annotations

import json
from typing import Any

from trimtab_server.engines.client import Upstream
from trimtab_server.engines.vllm.endpoints import CONTROLS, MODELS


async def prompt_bytes(upstream: Upstream) -> int | None:
    """Return an upper bound on the bytes of a prompt: the model's context times its longest token.

    None if the replica does not say both: it has no control yet, or another version of the plugin.
    """
    models, controls = [await _listed(upstream, path) for path in (MODELS, CONTROLS)]
    contexts = _numbers(models, "max_model_len")
    tokens = _numbers([control.get("mapping") for control in controls], "longest_target_token")
    return max(contexts) * max(tokens) if contexts and tokens else None


async def _listed(upstream: Upstream, path: str) -> list[Any]:
    body = await upstream.probe(path)
    try:
        return list(json.loads(body or "{}")["data"])
    except (ValueError, KeyError, TypeError):
        return []


def _numbers(objects: list[Any], key: str) -> list[int]:
    found = (each.get(key) for each in objects if isinstance(each, dict))
    return [number for number in found if type(number) is int]
