"""Errors of vLLM that have a cause in Trimtab's configuration."""

from __future__ import annotations

from collections.abc import Mapping

EXPLANATIONS: Mapping[str, str] = {
    "Pooling models do not support custom logits processors": (
        "this is a pooling model, which generates nothing that a control could steer: give it `controls: []`"
    ),
    "Custom logits processors are not supported when speculative decoding": (
        "vLLM's V1 model runner has no speculative decoding beside a control: turn it off, give the model"
        " `controls: []`, or set `runner: v2` on a GPU"
    ),
}
"""What to do about an error, by the text that vLLM prints."""
