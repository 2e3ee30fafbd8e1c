"""What the adapters for vLLM's two model runners share: who is let in, and which model is steered."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from trimtab_mappings import load_encoder
from trimtab_processors import metrics
from trimtab_processors.control import Target
from trimtab_processors.pack import ONLY_V2_ROUTINGS
from trimtab_processors.parameters import Parameters, ParametersError, parse_xargs
from trimtab_processors.settings import command_line_logprobs_mode, known_controls, validate

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


logger = logging.getLogger(__name__)

_RAW = "raw_"
"""What the modes of log-probabilities begin with that logits processors do not reach."""


def validate_params(sampling_params: SamplingParams, routings: Collection[str] | None = None) -> None:
    """Refuse a request in the front end, before an engine sees it.

    Args:
        sampling_params: what the request says.
        routings: the names of those that the engine has; None: all.

    Raises:
        VLLMValidationError: which vLLM answers with 400.
    """
    try:
        controls = known_controls()
        wanted = parse_xargs(sampling_params.extra_args)
        for parameters in wanted:
            if controls is not None:
                validate(parameters, controls)
            _require_routing(parameters, routings)
    except ParametersError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if wanted:
        _refuse_uncontrolled_logprobs(sampling_params)


def _refuse_uncontrolled_logprobs(params: SamplingParams) -> None:
    """Refuse log-probabilities that vLLM computes from the target's own logits."""
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        raise VLLMValidationError(
            "`prompt_logprobs` can't be used under a control: vLLM computes the log-probabilities of a prompt"
            " without the control. Leave it out, and `echo` if you ask for `logprobs`, or name no control",
            parameter="prompt_logprobs",
        )
    asks = params.logprobs is not None or params.logprob_token_ids is not None
    if asks and (mode := command_line_logprobs_mode() or "").startswith(_RAW):
        raise VLLMValidationError(
            f"`logprobs` can't be used under a control: this server's --logprobs-mode is {mode}, so that it"
            " returns those of the model without the control. Leave it out, or start the server with"
            " --logprobs-mode processed_logprobs",
            parameter="logprobs",
        )


def _require_routing(parameters: Parameters, routings: Collection[str] | None) -> None:
    if routings is not None and parameters.routing not in (None, *routings):
        raise ParametersError(f"trimtab_routing: {parameters.routing!r}: {ONLY_V2_ROUTINGS}")


def warn_of_raw_logprobs(vllm_config: VllmConfig) -> None:
    """Log a warning if the engine returns log-probabilities of the target without its controls."""
    mode = vllm_config.model_config.logprobs_mode
    if mode.startswith(_RAW):
        logger.warning(
            "trimtab: --logprobs-mode is %s, so that `logprobs` are those of the model without its controls;"
            " start vLLM with --logprobs-mode processed_logprobs",
            mode,
        )


def served_target(vllm_config: VllmConfig, device: torch.device) -> Target:
    """The model that vLLM was started with, as a control has to know it."""
    model = vllm_config.model_config
    name = model.served_model_name
    return Target(
        name if isinstance(name, str) else name[0],
        load_encoder(model.tokenizer, model.tokenizer_revision),
        model.get_vocab_size(),
        device,
    )


def count_on_one_rank(vllm_config: VllmConfig) -> bool:
    """Let the first of the ranks that shift the same logits count for all of them.

    Returns:
        Whether this one does.
    """
    parallel = vllm_config.parallel_config
    counts = not parallel.rank % parallel.tensor_parallel_size
    if not counts:
        metrics.silence()
    return counts
