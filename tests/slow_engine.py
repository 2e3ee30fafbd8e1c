"""A logits processor that makes a tiny model's steps as long as a larger one's.

An engine of a thousand steps a second is done before its front end sees a client go, or a test kills it.
"""

from __future__ import annotations

import time

from vllm.v1.sample.logits_processor import LogitsProcessor

STEP_SECONDS = 0.01


class Slow(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return False  # or greedy requests would not pass through it

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        time.sleep(STEP_SECONDS)
        return logits
