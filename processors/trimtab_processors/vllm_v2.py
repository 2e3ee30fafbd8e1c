"""The plugin for vLLM's V2 model runner: a thin adapter in front of the device runtime.

Start a vLLM server on a GPU with `--logits-processors trimtab_processors:ControlProcessor` and
`--additional-config '{"trimtab": {"controls": {"NAME": "PACK"}}}'`; a request then says `trimtab_control` in
its `vllm_xargs`. Asynchronous scheduling and speculative decoding stay on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from trimtab_processors.admission import (
    count_on_one_rank,
    served_target,
    validate_params,
    warn_of_raw_logprobs,
)
from trimtab_processors.device import Batch, DeviceRuntime
from trimtab_processors.pack import V2_ROUTINGS
from trimtab_processors.parameters import parse_xargs
from trimtab_processors.segments import History
from trimtab_processors.settings import read_settings
from trimtab_processors.worker_extension import attach

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

logger = logging.getLogger(__name__)


class ControlProcessor(LogitsProcessor):
    """Shifts the logits of the requests that name a control."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request in the front end, before an engine sees it.

        Raises:
            VLLMValidationError: which vLLM answers with 400.
        """
        validate_params(sampling_params, V2_ROUTINGS)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        """Load the configured controls.

        Raises:
            ValueError: the configuration is wrong.
        """
        warn_of_raw_logprobs(vllm_config)
        counts = count_on_one_rank(vllm_config)
        settings = read_settings(vllm_config.additional_config)
        if settings.control_cpus:
            raise ValueError(
                f"control_cpus {list(settings.control_cpus)}: only for vLLM's V1 model runner on CPUs"
            )
        speculation = vllm_config.speculative_config
        self._states = req_states
        self._runtime = DeviceRuntime(
            served_target(vllm_config, req_states.device),
            settings.controls,
            History(req_states.all_token_ids.gpu, req_states.total_len.gpu),
            tables=settings.tables.expanduser(),
            cache_bytes=settings.cache_bytes,
            neutral=settings.neutral,
            routing=settings.routing,
            kl_every=settings.kl_every if counts else 0,
            most_drafts=speculation.num_speculative_tokens if speculation else 0,
        )
        attach(self._runtime, lambda: None, req_states.device)
        logger.info(
            "trimtab: V2 model runner on %s, alignment `segments`, controls: %s",
            req_states.device,
            ", ".join(settings.controls) or "none",
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take up the request in slot `req_idx`, new or resumed; False where it is not under control."""
        return self._runtime.open(
            req_idx,
            parse_xargs(sampling_params.extra_args),
            int(self._states.prompt_len.np[req_idx]),
            int(self._states.prefill_len.np[req_idx]),
        )

    def apply_staged_writes(self) -> None:
        """Begin the step's rows beside the target's forward: the history ends in the last tokens by now."""
        self._runtime.begin()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Shift float32 [rows, vocabulary] in place."""
        rows = (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.input_ids, ctx.pos + 1)
        self._runtime.apply(logits, Batch(ctx.idx_mapping_np, *rows))
        return logits
