"""What a request may say to the plugin, as flat `vllm_xargs`.

vLLM's front end loads this module for every server, so it imports neither torch nor vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from trimtab_processors.pack import ControlName, Strength

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "trimtab_"
MAX_TOP_K = 1024
TopK = Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)]


class ParametersError(ValueError):
    """A request's parameters are malformed; the message names the key and the value."""


class Parameters(BaseModel):
    """The control of one request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control: ControlName
    """The control's name, as the worker was configured with."""
    strength: Strength | None = None
    """The factor on the shift; None: the pack's own."""
    prompt: tuple[Annotated[StrictInt, Field(ge=0)], ...] | None = None
    """The control's prompt in the control's token ids; None: the text of the target's prompt."""
    top_k: TopK | None = None
    """Only so many of the target's likeliest tokens are shifted; None: all of them.

    It keeps a control from lifting nonsense through a mapping that is only near (as UniTE and ULD do).
    """


def parse_xargs(extra_args: Mapping[str, Any] | None) -> Parameters | None:
    """Read `trimtab_control`, `trimtab_strength`, `trimtab_prompt` and `trimtab_top_k`; keys of others are
    left alone.

    Returns:
        None where the request names no control.

    Raises:
        ParametersError: a value is out of range, of the wrong type, or a `trimtab_` key is unknown.
    """
    own = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
    if not own:
        return None
    try:
        return Parameters.model_validate(own)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = PREFIX + ".".join(map(str, fault["loc"]))
        given = "" if fault["type"] == "missing" else f", got {str(fault['input'])[:80]!r}"
        raise ParametersError(f"{key}: {fault['msg']}{given}") from error


def to_xargs(parameters: Parameters) -> dict[str, Any]:
    """The inverse of `parse_xargs`: what the gateway writes into `vllm_xargs`."""
    return {
        PREFIX + key: value for key, value in parameters.model_dump(mode="json").items() if value is not None
    }
