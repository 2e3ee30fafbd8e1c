"""What the adapters for vLLM's two model runners share: who is let in, and which model is steered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from trimtab_mappings import load_vocabulary
from trimtab_processors import metrics
from trimtab_processors.control import Target
from trimtab_processors.pack import ONLY_PM_MINED, PM_MINED
from trimtab_processors.parameters import Parameters, ParametersError, parse_xargs
from trimtab_processors.settings import known_controls, validate

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


def validate_params(sampling_params: SamplingParams, *, only_pm_mined: bool = False) -> None:
    """Refuse a request in the front end, before an engine sees it.

    Args:
        sampling_params: what the request says.
        only_pm_mined: whether the engine has no other routing.

    Raises:
        VLLMValidationError: which vLLM answers with 400.
    """
    try:
        controls = known_controls()
        for parameters in parse_xargs(sampling_params.extra_args):
            if controls is not None:
                validate(parameters, controls)
            if only_pm_mined:
                _require_pm_mined(parameters)
    except ParametersError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error


def _require_pm_mined(parameters: Parameters) -> None:
    if parameters.routing not in (None, PM_MINED):
        raise ParametersError(f"trimtab_routing: {parameters.routing!r}: {ONLY_PM_MINED}")


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
