"""What a request may say to the plugin, as flat `vllm_xargs`.

vLLM's front end loads this module for every server, so it imports neither torch nor vLLM.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError

from trimtab_processors.pack import ControlName, RoutingName, Strength

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX = "trimtab_"
SEVERAL = "several"
"""What metrics call the control of a request that has more than one."""
MAX_CONTROLS = 8
MAX_TOP_K = 1024
MAX_UNTIL = 2**30
_NO_PROMPT = -1
_NO_TOP_K = 0
_NO_MIN_P = 0.0
_NO_UNTIL = 0
_NO_ROUTING = ""
TopK = Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)]
MinP = Annotated[float, Field(gt=0, le=1)]
Until = Annotated[StrictInt, Field(ge=1, le=MAX_UNTIL)]


class ParametersError(ValueError):
    """A request's parameters are malformed; the message names the key and the value."""


class ControlOptions(BaseModel):
    """How a control steers a request. Bodies, headers, aliases and xargs all carry these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: Strength | None = None
    """The factor on the shift; None: the pack's own."""
    top_k: TopK | None = None
    """Only so many of the target's likeliest tokens are shifted; None: all of them.

    It keeps a control from lifting nonsense through a mapping that is only near (as UniTE and ULD do).
    """
    min_p: MinP | None = None
    """A token is shifted only if the target finds it at least this share as likely as its likeliest token.

    The plausibility guard of contrastive decoding. None: all tokens are shifted.
    """
    until: Until | None = None
    """The number of generated tokens after which the control lets go; None: never."""
    routing: RoutingName | None = None
    """How the shift reaches the target's tokens; None: as the model or the pack says."""


class Parameters(ControlOptions):
    """One control of one request."""

    control: ControlName
    """The control's name, as the engine knows it."""
    prompt: tuple[Annotated[StrictInt, Field(ge=0)], ...] | None = None
    """The control's prompt in the control's token ids; None: the text of the target's prompt."""


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


_AtMost = Field(min_length=1, max_length=MAX_CONTROLS)
_Lengths = Annotated[StrictInt, Field(ge=_NO_PROMPT)]
_Routings = Literal["pm-mined", "path", "pieces", ""]
_TopKs = Annotated[StrictInt, Field(ge=_NO_TOP_K, le=MAX_TOP_K)]
_MinPs = Annotated[float, Field(ge=_NO_MIN_P, le=1)]
_Untils = Annotated[StrictInt, Field(ge=_NO_UNTIL, le=MAX_UNTIL)]


_OPTIONAL: Mapping[str, Any] = {
    "top_k": _NO_TOP_K,
    "min_p": _NO_MIN_P,
    "until": _NO_UNTIL,
    "routing": _NO_ROUTING,
}
"""Options that one of several controls may lack, and the value in a list that stands for none."""


class _Xargs(BaseModel):
    """The controls of a request as they travel: a list for each property, or the only control's value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control: Annotated[tuple[ControlName, ...], BeforeValidator(_listed), _AtMost]
    strength: Annotated[tuple[Strength, ...], BeforeValidator(_listed), _AtMost] | None = None
    prompt: tuple[Annotated[StrictInt, Field(ge=0)], ...] | None = None
    """All prompts of their own, one after the other."""
    prompt_lengths: Annotated[tuple[_Lengths, ...], BeforeValidator(_listed), _AtMost] | None = None
    """The tokens of each; -1 for none. Needed where there are several controls."""
    top_k: Annotated[tuple[_TopKs, ...], BeforeValidator(_listed), _AtMost] | None = None
    """0: all tokens are shifted."""
    min_p: Annotated[tuple[_MinPs, ...], BeforeValidator(_listed), _AtMost] | None = None
    """0: all tokens are shifted."""
    until: Annotated[tuple[_Untils, ...], BeforeValidator(_listed), _AtMost] | None = None
    """0: it never lets go."""
    routing: Annotated[tuple[_Routings, ...], BeforeValidator(_listed), _AtMost] | None = None
    """Empty: as the engine is set up."""


def parse_xargs(extra_args: Mapping[str, Any] | None) -> tuple[Parameters, ...]:
    """Read the options in `trimtab_control`, `trimtab_strength` and so on; leave keys of others alone.

    Of several controls each option is a list, and the prompts stand one after the other, with
    `trimtab_prompt_lengths` to tell them apart.

    Returns:
        The controls whose shifts are summed; none where the request names none.

    Raises:
        ParametersError: a value is out of range, of the wrong type, or a `trimtab_` key is unknown.
    """
    own = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
    if not own:
        return ()
    try:
        xargs = _Xargs.model_validate(own)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = PREFIX + ".".join(map(str, fault["loc"]))
        given = "" if fault["type"] == "missing" else f", got {str(fault['input'])[:80]!r}"
        raise ParametersError(f"{key}: {fault['msg']}{given}") from error
    return _parted(xargs)


def to_xargs(parameters: Sequence[Parameters]) -> dict[str, Any]:
    """The inverse of `parse_xargs`: what the gateway writes into `vllm_xargs`.

    Args:
        parameters: some controls; either all or none of several have a strength.
    """
    if len(parameters) == 1:
        given = parameters[0].model_dump(mode="json", exclude_none=True)
    else:
        strengths = [each.strength for each in parameters if each.strength is not None]
        optional = {
            key: [none if (value := getattr(each, key)) is None else value for each in parameters]
            for key, none in _OPTIONAL.items()
        }
        given = {
            "control": [each.control for each in parameters],
            **({"strength": strengths} if strengths else {}),
            **{key: values for key, values in optional.items() if any(values)},
            "prompt": [token for each in parameters for token in each.prompt or ()],
            "prompt_lengths": [
                _NO_PROMPT if each.prompt is None else len(each.prompt) for each in parameters
            ],
        }
    return {PREFIX + key: value for key, value in given.items()}


def _parted(xargs: _Xargs) -> tuple[Parameters, ...]:
    count = len(xargs.control)
    if len(set(xargs.control)) < count:
        raise ParametersError(f"{PREFIX}control: a control stands twice in {list(xargs.control)}")
    strengths = _for_each("strength", xargs.strength, count) or (None,) * count
    optional = {
        key: _for_each(key, getattr(xargs, key), count) or (none,) * count for key, none in _OPTIONAL.items()
    }
    return tuple(
        Parameters(
            control=control,
            strength=strengths[place],
            prompt=prompt,
            **{key: values[place] or None for key, values in optional.items()},
        )
        for place, (control, prompt) in enumerate(zip(xargs.control, _prompts(xargs, count), strict=True))
    )


def _for_each(key: str, values: tuple[Any, ...] | None, count: int) -> tuple[Any, ...] | None:
    if values is not None and len(values) != count:
        raise ParametersError(f"{PREFIX}{key}: {len(values)} values for {count} controls")
    return values


def _prompts(xargs: _Xargs, count: int) -> list[tuple[int, ...] | None]:
    lengths = _for_each("prompt_lengths", xargs.prompt_lengths, count)
    if lengths is None:
        if xargs.prompt is not None and count > 1:
            raise ParametersError(f"{PREFIX}prompt_lengths: needed, since {count} controls share the prompt")
        return [xargs.prompt] * count
    prompt = xargs.prompt or ()
    ends = [0, *accumulate(max(length, 0) for length in lengths)]
    if ends[-1] != len(prompt):
        raise ParametersError(f"{PREFIX}prompt_lengths: they add up to {ends[-1]}, not to {len(prompt)}")
    return [
        None if length == _NO_PROMPT else prompt[start:end]
        for length, (start, end) in zip(lengths, pairwise(ends), strict=True)
    ]
