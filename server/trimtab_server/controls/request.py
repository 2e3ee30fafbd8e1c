"""What a request says of control: in its body, in a header, or in the model's name.

`alpaca=0.7,forget;top_k=50;routing=path` is what headers and aliases may say, and what answers say of what
was applied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, ValidationError

from trimtab_processors.parameters import MAX_CONTROLS, ControlOptions
from trimtab_server.errors import BadRequestError

FIELD = "control"
ALIAS = ":"
"""Stands between a model's name and its controls."""
MAX_DIGITS = 400
"""Maximum length of a number in a header or an alias; Python itself refuses to convert very long ones."""
OFF, ON = "off", "on"
_MAX_ALIAS = 1024
"""Characters. The answer to an alias repeats it, a stream in every event."""
_OPTIONS = [option for option in ControlOptions.model_fields if option != "strength"]
_TERM = re.compile(
    r"(?P<name>[^=;,\s]+)(=(?P<strength>[^=;,\s]+))?"
    rf"(?P<options>(;\s*({'|'.join(_OPTIONS)})=[^=;,\s]+)*)"
)
# As in JSON: float() and int() would also take 1_0, +1, .5 and the digits of other scripts.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(_INTEGER.pattern + r"(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBERS: Mapping[str, tuple[re.Pattern[str], Callable[[str], float]]] = {
    **dict.fromkeys(("top_k", "until"), (_INTEGER, int)),
    **dict.fromkeys(("strength", "min_p"), (_NUMBER, float)),
}
_GRAMMAR = (
    f"a name: it takes NAME[=STRENGTH][;OPTION=VALUE], several with commas; options: {', '.join(_OPTIONS)}"
)
_FORMS = (
    f"true, false, a name, an object with name, strength, {', '.join(_OPTIONS)},"
    " or a list of names and objects"
)


class Selection(ControlOptions):
    """One control that a request asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str


ControlRequest = bool | Sequence[Selection]
"""False: off. True: the model's default, or its only one. Else these, summed."""


def from_body(value: Any) -> ControlRequest:
    """What `control` in a body says.

    Raises:
        BadRequestError: it says nothing that can be understood; `param` is the place.
    """
    match value:
        case bool():
            return value
        case list():
            _require_few(len(value), FIELD)
            return [_selection(item, f"{FIELD}.{place}") for place, item in enumerate(value)]
    return [_selection(value, FIELD)]


def from_text(text: str, param: str) -> ControlRequest:
    """What a header or an alias says; `param` is which.

    Raises:
        BadRequestError: it says nothing that can be understood.
    """
    stripped = text.strip()
    if stripped in (OFF, ON):
        return stripped == ON
    _require_few(stripped.count(",") + 1, param)
    return [_term(term.strip(), param) for term in stripped.split(",")]


def split_alias(model: Any) -> tuple[Any, str | None]:
    """A model's name, and what stands behind it of controls, if anything."""
    if not isinstance(model, str) or ALIAS not in model:
        return model, None
    name, _, said = model.partition(ALIAS)
    if len(said) > _MAX_ALIAS:
        raise BadRequestError(
            f"`model` has {len(said)} characters behind {ALIAS!r}, more than {_MAX_ALIAS}", param="model"
        )
    return name, said


def _require_few(count: int, param: str) -> None:
    if count > MAX_CONTROLS:
        raise BadRequestError(f"{param}: {count} controls, more than {MAX_CONTROLS}", param=param)


def _term(term: str, param: str) -> Selection:
    found = _TERM.fullmatch(term)
    if found is None:
        raise BadRequestError(f"{param}: {term[:80]!r} is not {_GRAMMAR}, or {OFF}, or {ON}", param=param)
    options = [option.strip().split("=") for option in found["options"].split(";")[1:]]
    said: dict[str, Any] = dict(options)
    if len(said) < len(options):
        raise BadRequestError(f"{param}: an option stands twice in {term[:80]!r}", param=param)
    said |= {} if found["strength"] is None else {"strength": found["strength"]}
    said |= {name: _number(said[name], *form, param) for name, form in _NUMBERS.items() if name in said}
    return _validated({"name": found["name"], **said}, param)


def _number(text: str, form: re.Pattern[str], convert: Callable[[str], float], param: str) -> float:
    if not form.fullmatch(text) or len(text) > MAX_DIGITS:
        kind = "an integer" if convert is int else "a number"
        raise BadRequestError(f"{param}: {text[:80]!r} is not {kind}; write it as in JSON", param=param)
    return convert(text)


def _selection(value: Any, param: str) -> Selection:
    name = value.get("name") if isinstance(value, dict) else value
    if name in (OFF, ON):
        write = "true" if name == ON else "false"
        raise BadRequestError(
            f"{param}: {name!r} is not a control; a body turns control {name} by `{FIELD}: {write}`",
            param=param,
        )
    if isinstance(value, str):
        return Selection(name=value)
    if not isinstance(value, dict):
        raise BadRequestError(f"{param}: {_FORMS}; got {str(value)[:80]}", param=param)
    return _validated(value, param)


def _validated(value: dict[str, Any], param: str) -> Selection:
    try:
        return Selection.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, (param, *fault["loc"])))[:80]
        if fault["type"] == "extra_forbidden":
            message = (
                f"{place}: unknown key; a control has: {', '.join(('name', *ControlOptions.model_fields))}"
            )
        elif fault["type"] == "missing":
            message = f"{place}: {fault['msg']}"
        else:
            message = f"{place}: {fault['msg']}, got {fault['input']!r:.80}"
        raise BadRequestError(message, param=place) from error
