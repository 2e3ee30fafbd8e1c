"""Names and sizes that the API, the controls and the engines agree on."""

from __future__ import annotations

CONTROL_HEADER = "x-trimtab-control"
"""The header in which a request names its controls, and an answer the ones that were applied."""
REQUEST_ID = "x-request-id"
ANTHROPIC_REQUEST_ID = "request-id"
"""The header in which Anthropic's clients look for the request's id."""
SMALL_BODY_BYTES = 2**16
"""Larger bodies and conversations are handled in threads, so that other requests go on. Smaller ones are
not counted towards `limits.body_bytes_total`: the limits on requests bound their number."""
