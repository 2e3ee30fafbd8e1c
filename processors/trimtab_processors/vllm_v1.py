"""The plugin for vLLM's V1 model runner: a thin adapter in front of the runtime.

Start any vLLM server with `--logits-processors trimtab_processors:ControlProcessor` and
`--additional-config '{"trimtab": {"controls": {"NAME": "PACK"}}}'`; a request then says `trimtab_control` in
its `vllm_xargs`.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from trimtab_processors.admission import (
    count_on_one_rank,
    served_target,
    validate_params,
    warn_of_raw_logprobs,
)
from trimtab_processors.beside import Worker
from trimtab_processors.parameters import parse_xargs
from trimtab_processors.runtime import Request, Runtime
from trimtab_processors.settings import read_settings
from trimtab_processors.worker_extension import attach

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class ControlProcessor(LogitsProcessor):
    """Shifts the logits of the requests that name a control."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request in the front end, before an engine sees it.

        Raises:
            VLLMValidationError: which vLLM answers with 400.
        """
        validate_params(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        """Load the configured controls.

        Raises:
            ValueError: the configuration is wrong, or the engine schedules asynchronously.
        """
        if vllm_config.scheduler_config.async_scheduling:
            raise ValueError(
                "trimtab reads each sampled token on the host, which asynchronous scheduling does not"
                " give it: start vLLM with --no-async-scheduling"
            )
        warn_of_raw_logprobs(vllm_config)
        counts = count_on_one_rank(vllm_config)
        settings = read_settings(vllm_config.additional_config)
        if settings.control_cpus and device.type != "cpu":
            raise ValueError(
                f"control_cpus {list(settings.control_cpus)}: only on CPUs; this engine runs on {device}"
            )
        self._runtime = Runtime(
            served_target(vllm_config, device),
            settings.controls,
            tables=settings.tables.expanduser(),
            cache_bytes=settings.cache_bytes,
            neutral=settings.neutral,
            routing=settings.routing,
            kl_every=settings.kl_every if counts else 0,
        )
        self._began = self._blocked = 0.0
        """When the step began, and for how long it has been held up."""
        self._requests: dict[int, tuple[Request, ...]] = {}
        """By row; several of one row are summed."""
        self._worker = Worker(settings.control_cpus)
        attach(self._runtime, self._worker.wait, device)
        logger.info(
            "trimtab: V1 model runner on %s, alignment `retokenize`, control's forward %s, controls: %s",
            device,
            f"beside, on cores {list(settings.control_cpus)}" if settings.control_cpus else "in series",
            ", ".join(settings.controls) or "none",
        )

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch, then begin the rows of this step; the output lists already end in the last
        tokens.
        """
        self._began = time.perf_counter()
        self._worker.wait()  # for a step whose logits were not wanted
        if batch_update:
            self._follow(batch_update)
        if self._requests:
            requests = [request for of_row in self._requests.values() for request in of_row]
            self._worker.start(partial(self._runtime.step, requests))
        self._blocked = time.perf_counter() - self._began

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Shift float32 [requests, vocabulary] in place."""
        started = time.perf_counter()
        self._worker.wait()
        if self._requests:
            self._runtime.apply(logits, self._requests)
            now = time.perf_counter()
            self._runtime.count_step(now - self._began, self._blocked + now - started)
        return logits

    def _follow(self, update: BatchUpdate) -> None:
        for index in update.removed:
            self._close(index)
        for index, params, prompt, output in update.added:
            self._open(index, params, prompt, output)
        for source, destination, direction in update.moved:
            self._move(source, destination, direction)

    def _open(self, index: int, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> None:
        # vLLM does not report as removed a request whose place a new one takes in the same step.
        self._close(index)
        opened = [
            self._runtime.open(parameters, prompt or [], output)
            for parameters in parse_xargs(params.extra_args)
        ]
        if requests := tuple(request for request in opened if request):
            self._requests[index] = requests

    def _close(self, index: int) -> None:
        for request in self._requests.pop(index, ()):
            self._runtime.close(request)

    def _move(self, source: int, destination: int, direction: MoveDirectionality) -> None:
        moving, replaced = self._requests.pop(source, ()), self._requests.pop(destination, ())
        if moving:
            self._requests[destination] = moving
        if replaced and direction == MoveDirectionality.SWAP:
            self._requests[source] = replaced
        else:
            for request in replaced:
                self._runtime.close(request)
