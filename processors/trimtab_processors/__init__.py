"""The control runtime: small models whose logits shift those of large ones.

`trimtab_processors:ControlProcessor` is the plugin for either of vLLM's model runners.
"""

from __future__ import annotations

import sys
from typing import Any

_V2_LOADER = "vllm.v1.worker.gpu.sample.logits_processor"


def __getattr__(name: str) -> Any:
    """Give vLLM the processor class of the model runner that asks for `ControlProcessor`.

    Each runner loads processors by a loader of its own, and takes no class but those of its own interface.
    Anyone else gets the class for the V1 runner.
    """
    if name != "ControlProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    asking = str(sys._getframe(1).f_globals.get("__name__"))  # noqa: SLF001 - the loader says it in no other way
    if asking.startswith(_V2_LOADER):
        from trimtab_processors import vllm_v2  # noqa: PLC0415 - it imports vLLM

        return vllm_v2.ControlProcessor
    from trimtab_processors import vllm_v1  # noqa: PLC0415

    return vllm_v1.ControlProcessor
