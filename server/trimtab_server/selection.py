"""What a request says of control: in its body, in a header, or in the model's name.

`alpaca=0.7,forget;top_k=50;routing=path` is what headers and aliases may say, and what answers say of what
was applied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab_processors.pack import RequestRouting, Strength
from trimtab_processors.parameters import MAX_CONTROLS, TopK
from trimtab_server.errors import BadRequestError

FIELD = "control"
HEADER = "x-trimtab-control"
ALIAS = ":"
"""Stands between a model's name and its controls."""
OFF, ON = "off", "on"
_TERM = re.compile(
    r"(?P<name>[^=;,\s]+)(=(?P<strength>[^=;,\s]+))?(?P<options>(;\s*(top_k|routing)=[^=;,\s]+)*)"
)
_GRAMMAR = "a name: it takes NAME[=STRENGTH][;top_k=N][;routing=NAME], several with commas"
_FORMS = (
    "true, false, a name, an object with name, strength, top_k and routing, or a list of names and objects"
)


class Selection(BaseModel):
    """One control that a request asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    strength: Strength | None = None
    """None: its pack's own."""
    top_k: TopK | None = None
    """Only so many of the target's likeliest tokens are shifted; None: all of them."""
    routing: RequestRouting | None = None
    """How the shift reaches the target's tokens; None: as the model or the pack says."""


Wanted = bool | Sequence[Selection]
"""False: off. True: the model's default, or its only one. Else these, summed."""


def from_body(value: Any) -> Wanted:
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


def from_text(text: str, param: str) -> Wanted:
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
    try:
        strength = None if found["strength"] is None else float(found["strength"])
        said |= {"top_k": int(said["top_k"])} if "top_k" in said else {}
    except ValueError as error:
        raise BadRequestError(f"{param}: {error} in {term[:80]!r}", param=param) from error
    return _validated({"name": found["name"], "strength": strength, **said}, param)


def _selection(value: Any, param: str) -> Selection:
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
            message = f"{place}: unknown key; a control has: {', '.join(Selection.model_fields)}"
        elif fault["type"] == "missing":
            message = f"{place}: {fault['msg']}"
        else:
            message = f"{place}: {fault['msg']}, got {str(fault['input'])[:80]}"
        raise BadRequestError(message, param=place) from error
