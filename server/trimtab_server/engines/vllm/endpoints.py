"""Access to the endpoints of a worker: open to clients, to admins, or to nobody.

The lists name every endpoint of vLLM 0.32, whether a flag opens it or not. The tests compare them with
vLLM itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache

ALLOWED: Mapping[str, frozenset[str]] = {
    path: frozenset(methods.split())
    for methods, paths in {
        "POST": (
            *("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
            *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
            *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
            *("/v1/audio/transcriptions", "/v1/audio/translations"),
            *("/v1/chat/completions/render", "/v1/completions/render"),
            *("/v1/responses/render", "/v1/messages/render", "/cohere/v2/chat/render"),
            *("/v1/chat/completions/derender", "/v1/completions/derender"),
            "/v1/responses/{response_id}/cancel",
        ),
        "GET": ("/v1/responses/{response_id}", "/version", "/load"),
        "GET POST": ("/ping",),
    }.items()
    for path in paths
}
"""Endpoints that pass for every client, and their methods."""

ADMIN: frozenset[str] = frozenset(
    {
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/{adapter_name}"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/fault_tolerance/status"),
        *("/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/collective_rpc", "/server_info", "/start_profile", "/stop_profile"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/get_world_size"),
        *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
        *("/update_weights", "/update_weight_version", "/weight_info", "/weight_checker"),
        *("/tokenizer_info", "/kv_event_sources"),
        *("/docs", "/docs/oauth2-redirect", "/redoc", "/static"),
    }
)
"""Endpoints that pass with an admin key, or if `pass_through` names them."""

DISABLED: frozenset[str] = frozenset(
    {
        *("/invocations", "/inference/v1/generate", "/v1/chat/completions/batch", "/cohere/v2/chat"),
        *("/generative_scoring", "/v1/systemone"),
    }
)
"""Endpoints that never pass: they generate, and would bypass controls and limits."""

OWN: frozenset[str] = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/models", "/health", "/metrics", "/openapi.json"),
    }
)
"""Endpoints of vLLM that the gateway answers itself, or checks before it passes them on."""

WEBSOCKETS: frozenset[str] = frozenset({"/v1/realtime"})
"""WebSocket endpoints. They never pass, because the gateway relays HTTP alone."""


class Access(Enum):
    """Who may use a worker's endpoint."""

    CLIENT = "client"
    ADMIN = "admin"
    UNKNOWN = "unknown"
    """vLLM 0.32 has no such endpoint: a plugin or another version may, so that an admin key opens it."""
    DISABLED = "disabled"


def access_to(path: str, pass_through: Iterable[str] = ()) -> Access:
    """Return who may use the endpoint at `path`.

    Args:
        path: the decoded path of a request.
        pass_through: paths that the configuration opens for every client.
    """
    if is_disabled(path):
        return Access.DISABLED
    if methods_at(path) or _is_among(path, pass_through):
        return Access.CLIENT
    return Access.ADMIN if _is_among(path, ADMIN) else Access.UNKNOWN


def is_disabled(path: str) -> bool:
    """Whether a request to `path` would bypass controls and limits, in any case and with any slashes."""
    return "/" + re.sub(r"/+", "/", path).strip("/").lower() in DISABLED


def methods_at(path: str) -> frozenset[str]:
    """The methods of the endpoint at `path` that pass for every client; empty if it is not in `ALLOWED`."""
    found = (methods for template, methods in ALLOWED.items() if _pattern(template).fullmatch(path))
    return next(found, frozenset())


def _is_among(path: str, templates: Iterable[str]) -> bool:
    return any(_pattern(template).fullmatch(path) for template in templates)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A parameter is one segment, and not one that a proxy would resolve: no `.` or `..`."""
    literals = re.split(r"\{\w+\}", template)
    return re.compile(r"(?!\.{1,2}(?:/|$))[^/]+".join(map(re.escape, literals)))
