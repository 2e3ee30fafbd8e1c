"""The table of endpoints: every one of vLLM 0.32 and of the gateway, and who may use it.

The table has every endpoint of vLLM, whether a flag opens it or not. The tests compare it with vLLM itself.
This module imports nothing of the server, so that every layer can use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import NamedTuple

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
GENERATING = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
HEALTH, READY, METRICS = "/health", "/ready", "/metrics"
MODELS, CONTROLS = "/v1/models", "/v1/controls"
LOAD, UNLOAD = "/v1/load_control", "/v1/unload_control"


class Access(Enum):
    """Who may use a replica's endpoint."""

    GATEWAY = "gateway"
    """The gateway answers the endpoint itself, or checks a request before it passes it on."""
    CLIENT = "client"
    ADMIN = "admin"
    """The endpoint needs an admin key, unless `pass_through` names it."""
    UNKNOWN = "unknown"
    """vLLM 0.32 has no such endpoint. A plugin or another version may have it, so an admin key opens it."""
    DISABLED = "disabled"
    """The endpoint generates, and would bypass controls and limits."""
    WEBSOCKET = "websocket"
    """The gateway relays HTTP only."""


class Endpoint(NamedTuple):
    """One row of the table."""

    access: Access
    methods: frozenset[str] = frozenset()
    """The methods that clients may use."""
    has_label: bool = False
    """Whether metrics and the log show the path; otherwise they show `other`."""


ENDPOINTS: Mapping[str, Endpoint] = {
    path: Endpoint(access, frozenset(methods.split()), has_label)
    for access, methods, has_label, paths in (
        (
            *(Access.GATEWAY, "", True),
            (HEALTH, READY, METRICS, MODELS, CONTROLS, LOAD, UNLOAD, "/openapi.json", *GENERATING),
        ),
        (
            *(Access.CLIENT, "POST", True),
            (
                *("/tokenize", "/detokenize", "/v1/embeddings", "/pooling", "/classify", "/score", "/rerank"),
                *("/v1/audio/transcriptions", "/v1/audio/translations"),
            ),
        ),
        (Access.CLIENT, "GET", True, ("/version",)),
        (
            *(Access.CLIENT, "POST", False),
            (
                *("/v1/messages/count_tokens", "/v2/embed", "/v1/score", "/v1/rerank", "/v2/rerank"),
                *("/v1/chat/completions/render", "/v1/completions/render"),
                *("/v1/responses/render", "/v1/messages/render", "/cohere/v2/chat/render"),
                *("/v1/chat/completions/derender", "/v1/completions/derender"),
                "/v1/responses/{response_id}/cancel",
            ),
        ),
        (Access.CLIENT, "GET", False, ("/v1/responses/{response_id}", "/load")),
        (Access.CLIENT, "GET POST", False, ("/ping",)),
        (
            *(Access.ADMIN, "", False),
            (
                *(
                    "/v1/load_lora_adapter",
                    "/v1/unload_lora_adapter",
                    "/adapters",
                    "/adapters/{adapter_name}",
                ),
                *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
                *("/fault_tolerance/apply", "/fault_tolerance/status"),
                *("/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"),
                *("/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests"),
                *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
                *("/collective_rpc", "/server_info", "/start_profile", "/stop_profile"),
                *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/get_world_size"),
                *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
                *("/update_weights", "/update_weight_version", "/weight_info", "/weight_checker"),
                *("/tokenizer_info", "/kv_event_sources"),
                *("/docs", "/docs/oauth2-redirect", "/redoc", "/static"),
            ),
        ),
        (
            *(Access.DISABLED, "", False),
            (
                *("/invocations", "/inference/v1/generate", "/v1/chat/completions/batch", "/cohere/v2/chat"),
                *("/generative_scoring", "/v1/systemone"),
            ),
        ),
        (Access.WEBSOCKET, "", False, ("/v1/realtime",)),
    )
    for path in paths
}


def paths_with(access: Access) -> frozenset[str]:
    """Return the paths of the endpoints with this access."""
    return frozenset(path for path, endpoint in ENDPOINTS.items() if endpoint.access is access)


def access_to(path: str, pass_through: Iterable[str] = ()) -> Access:
    """Return who may use the endpoint at `path` of a replica.

    Args:
        path: the decoded path of a request.
        pass_through: paths that the configuration opens for every client.
    """
    if is_disabled(path):
        return Access.DISABLED
    if methods_at(path) or any(_pattern(template).fullmatch(path) for template in pass_through):
        return Access.CLIENT
    return Access.ADMIN if _find(path, Access.ADMIN) else Access.UNKNOWN


def is_disabled(path: str) -> bool:
    """Whether a request to `path` would bypass controls and limits, in any case and with any slashes."""
    endpoint = ENDPOINTS.get("/" + re.sub(r"/+", "/", path).strip("/").lower())
    return endpoint is not None and endpoint.access is Access.DISABLED


def methods_at(path: str) -> frozenset[str]:
    """Return the methods that every client may use at `path`; empty if clients may use none."""
    endpoint = _find(path, Access.CLIENT)
    return endpoint.methods if endpoint else frozenset()


def label_of(path: str) -> str:
    """Return the label of a path in metrics and the log. The number of labels is bounded."""
    endpoint = ENDPOINTS.get(path)
    return path if endpoint is not None and endpoint.has_label else "other"


def _find(path: str, access: Access) -> Endpoint | None:
    rows = ((template, endpoint) for template, endpoint in ENDPOINTS.items() if endpoint.access is access)
    return next((endpoint for template, endpoint in rows if _pattern(template).fullmatch(path)), None)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Compile a template. A parameter is one segment, but not `.` or `..`, which a proxy would resolve."""
    literals = re.split(r"\{\w+\}", template)
    return re.compile(r"(?!\.{1,2}(?:/|$))[^/]+".join(map(re.escape, literals)))
