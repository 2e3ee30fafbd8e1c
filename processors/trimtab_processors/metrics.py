"""What the plugin counts, in prometheus-client's default registry.

Where `PROMETHEUS_MULTIPROC_DIR` is set, vLLM's own `/metrics` shows these beside its own.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

_LABELS = ("model_name", "control")

REQUESTS = Counter("trimtab_controlled_requests", "Requests that a control steers.", _LABELS)
TOKENS = Counter("trimtab_controlled_tokens", "Rows of logits that were shifted.", _LABELS)
REALIGNMENTS = Counter(
    "trimtab_realignments", "Times that generated text was tokenized anew for the control.", _LABELS
)
ROLLED_BACK = Counter(
    "trimtab_rolled_back_tokens",
    "Computed tokens of a control's context that a new alignment dropped.",
    _LABELS,
)
TRUNCATIONS = Counter(
    "trimtab_context_truncations", "Times that a control's context was cut to its window.", _LABELS
)
NON_FINITE = Counter("trimtab_non_finite_shifts", "Rows left alone since the shift was not finite.", _LABELS)
UNKNOWN = Counter(
    "trimtab_unknown_control_requests",
    "Requests left alone since the engine has no such control.",
    ("model_name",),
)
FORWARD_SECONDS = Counter(
    "trimtab_control_forward_seconds", "Time spent in the forward passes of controls.", ("model_name",)
)
APPLY_SECONDS = Counter(
    "trimtab_apply_seconds",
    "Time that waiting for shifts and applying them held up the engine's step.",
    ("model_name",),
)
BLOCKS = Gauge(
    "trimtab_blocks_in_use",
    "Blocks of the control's cache in use.",
    _LABELS,
    multiprocess_mode="livesum",
)
_ALL = (
    *(REQUESTS, TOKENS, REALIGNMENTS, ROLLED_BACK, TRUNCATIONS, NON_FINITE, UNKNOWN),
    *(FORWARD_SECONDS, APPLY_SECONDS, BLOCKS),
)


class _Nobody:
    """What `labels` gives in a process that does not count."""

    def inc(self, amount: float = 1) -> None:
        """Count nothing."""

    def set(self, value: float) -> None:
        """Show nothing."""


def silence() -> None:
    """Count nothing in this process: every rank of an engine does the same, and one of them counts."""
    for metric in _ALL:
        metric.labels = lambda *_: _Nobody()  # type: ignore[method-assign, assignment]
