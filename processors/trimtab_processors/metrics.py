"""What the plugin counts, in prometheus-client's default registry; docs/metrics.md says what it means.

Where `PROMETHEUS_MULTIPROC_DIR` is set, vLLM's own `/metrics` shows these beside its own.
"""

from __future__ import annotations

import math

from prometheus_client import Counter, Gauge, Histogram

MODEL = ("model_name",)
CONTROL = (*MODEL, "control")

REQUESTS = Counter("trimtab_controlled_requests", "Requests that a control steers.", CONTROL)
TOKENS = Counter("trimtab_controlled_tokens", "Rows of logits that were shifted.", CONTROL)
ALIGNED = Counter(
    "trimtab_aligned_tokens", "Generated tokens of text that were brought into a control's context.", CONTROL
)
EXACT = Counter(
    "trimtab_exact_tokens",
    "Generated tokens of text that came into a control's context as one token of the same bytes.",
    CONTROL,
)
REALIGNMENTS = Counter(
    "trimtab_realignments", "Times that generated text was tokenized anew for the control.", CONTROL
)
ROLLED_BACK = Counter(
    "trimtab_rolled_back_tokens",
    "Computed tokens of a control's context that a new alignment dropped.",
    CONTROL,
)
TRUNCATIONS = Counter(
    "trimtab_context_truncations", "Times that a control's context was cut to its window.", CONTROL
)
NON_FINITE = Counter("trimtab_non_finite_shifts", "Rows left alone since the shift was not finite.", CONTROL)
UNKNOWN = Counter(
    "trimtab_unknown_control_requests", "Requests left alone since the engine has no such control.", MODEL
)
FORWARD_SECONDS = Counter(
    "trimtab_control_forward_seconds",
    "Time spent on a control's rows: alignment, its forward pass, routing.",
    CONTROL,
)
BLOCKING_SECONDS = Counter(
    "trimtab_blocking_seconds", "Time for which control held up the steps with a controlled request.", MODEL
)
STEP_SECONDS = Counter(
    "trimtab_step_seconds",
    "Time of the engine's steps with a controlled request, up to their shifted logits.",
    MODEL,
)
STEPS = Counter("trimtab_steps", "The engine's steps with a controlled request.", MODEL)
BLOCKS = Gauge(
    "trimtab_blocks_in_use",
    "Blocks of the control's cache in use.",
    CONTROL,
    multiprocess_mode="livesum",
)
BLOCK_CAPACITY = Gauge(
    "trimtab_block_capacity", "Blocks that the control's cache has.", CONTROL, multiprocess_mode="livesum"
)
KL = Histogram(
    "trimtab_shift_kl_nats",
    "KL divergence of the controlled from the target's own next-token distribution, on a sample of steps.",
    CONTROL,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 8, 13, 21),
)
OF_MODELS = (UNKNOWN, BLOCKING_SECONDS, STEP_SECONDS, STEPS)
OF_CONTROLS = (
    *(REQUESTS, TOKENS, ALIGNED, EXACT, REALIGNMENTS, ROLLED_BACK, TRUNCATIONS, NON_FINITE),
    *(FORWARD_SECONDS, BLOCKS, BLOCK_CAPACITY, KL),
)


def announce(model: str, control: str, blocks: int) -> None:
    """Show everything of a control with `blocks` blocks before anything happened: a rate has to see zero
    before one.
    """
    for of_model in OF_MODELS:
        of_model.labels(model)
    for of_control in OF_CONTROLS:
        of_control.labels(model, control)
    BLOCK_CAPACITY.labels(model, control).set(blocks)


def withdraw(model: str, control: str) -> None:
    """A control is unloaded: what it counted stays, it has no cache any more."""
    for gauge in (BLOCKS, BLOCK_CAPACITY):
        gauge.labels(model, control).set(0)


def count_step(model: str, *, seconds: float, blocked: float, begins: bool = True) -> None:
    """Count a step with a controlled request, or a further part of one.

    Args:
        model: whose step it is.
        seconds: from its beginning to its shifted logits.
        blocked: for how much of that control held it up.
        begins: whether it is not a further part.
    """
    STEPS.labels(model).inc(int(begins))
    STEP_SECONDS.labels(model).inc(seconds)
    BLOCKING_SECONDS.labels(model).inc(blocked)


def observe_divergence(model: str, control: str, nats: float) -> None:
    """Count a row that was measured; one of a target whose own logits are broken says nothing."""
    if math.isfinite(nats):
        KL.labels(model, control).observe(nats)


class _Nobody:
    """What `labels` gives in a process that does not count."""

    def inc(self, amount: float = 1) -> None:
        """Count nothing."""

    def set(self, value: float) -> None:
        """Show nothing."""

    def observe(self, value: float) -> None:
        """See nothing."""


def silence() -> None:
    """Count nothing in this process: every rank of an engine does the same, and one of them counts."""
    for metric in (*OF_MODELS, *OF_CONTROLS):
        metric.labels = lambda *_: _Nobody()  # type: ignore[method-assign, assignment]
