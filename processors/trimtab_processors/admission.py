"""What the adapters for vLLM's two model runners share: who is let in, and which model is steered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from trimtab_mappings import load_vocabulary
from trimtab_processors import metrics
from trimtab_processors.control import Target
from trimtab_processors.parameters import ParametersError, parse_xargs
from trimtab_processors.settings import known_controls, validate

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


def validate_params(sampling_params: SamplingParams) -> None:
    """Refuse a request in the front end, before an engine sees it.

    Raises:
        VLLMValidationError: which vLLM answers with 400.
    """
    try:
        controls = known_controls()
        for parameters in parse_xargs(sampling_params.extra_args):
            if controls is not None:
                validate(parameters, controls)
    except ParametersError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error


def served_target(vllm_config: VllmConfig, device: torch.device) -> Target:
    """The model that vLLM was started with, as a control has to know it."""
    model = vllm_config.model_config
    name = model.served_model_name
    return Target(
        name if isinstance(name, str) else name[0],
        load_vocabulary(model.tokenizer, model.tokenizer_revision),
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
