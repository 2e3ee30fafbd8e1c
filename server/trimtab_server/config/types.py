"""The types of single values in a configuration, and how each is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from trimtab_processors.settings import PluginSettings
from trimtab_server.engines.vllm.endpoints import is_disabled
from trimtab_server.engines.vllm.flags import (
    CONTROL_PROCESSOR,
    RESERVED_FLAGS,
    RUNNER_PROCESSORS,
    RUNNER_VARIABLE,
)

API_KEYS_VARIABLE = "TRIMTAB_API_KEYS"
ADMIN_KEYS_VARIABLE = "TRIMTAB_ADMIN_KEYS"
_AT_THE_TOP = frozenset({"controls", "control_roots", "tables"})
"""Options of the plugin that are the same for all models."""


class SettingsError(ValueError):
    """A configuration that can't be used; the message names the file, the place and what is allowed there."""


def _base(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("base", "."))


def _local(path: Path, info: ValidationInfo) -> Path:
    return (_base(info) / path.expanduser()).absolute()


def _located(location: str, info: ValidationInfo) -> str:
    path = _base(info) / Path(location).expanduser()
    if path.exists():
        return str(path.resolve())
    if location.startswith((".", "/", "~")):
        raise ValueError(f"there is no {path}")
    return location


def _flag(name: str) -> str:
    flag = name.replace("_", "-")
    if not re.fullmatch(r"[A-Za-z][\w.+-]*", name):
        raise ValueError(f"{name!r} is no flag of vLLM's: write its name without the leading dashes")
    if flag.partition(".")[0] in RESERVED_FLAGS:
        raise ValueError(f"Trimtab sets --{flag} itself, or relies on its default")
    return flag


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError("the flag has no value: write true for a flag without one")
    return value


def _none_if_off(value: Any) -> Any:
    """YAML reads `off` as false, and `on` as true, which pydantic would take for a second."""
    if value is True:
        raise ValueError("a number of seconds, or off")
    return None if value is False or value == "off" else value


def _environment(variables: dict[str, str]) -> dict[str, str]:
    if RUNNER_VARIABLE in variables:
        raise ValueError(f"{RUNNER_VARIABLE} is set by the model's `runner`: v1 or v2")
    return variables


def _processor(name: str) -> str:
    return CONTROL_PROCESSOR if name in RUNNER_PROCESSORS else name


def require_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


def _may_pass(path: str) -> str:
    if is_disabled(path):
        raise ValueError(f"{path} would bypass controls and limits, and can't be opened")
    return path


class WithoutTopLevel:
    """The schema of the plugin's options without those that stand at the top of the configuration."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference)["properties"]
        for name in _AT_THE_TOP & properties.keys():
            del properties[name]
        return reference


def require_own_options(plugin: PluginSettings) -> PluginSettings:
    if placed := plugin.model_fields_set & _AT_THE_TOP:
        raise ValueError(f"{', '.join(sorted(placed))} stand at the top of the configuration, not here")
    return plugin


LocalPath = Annotated[Path, AfterValidator(_local)]
"""A path; a relative one starts at the configuration file."""
Location = Annotated[str, Field(min_length=1), AfterValidator(_located)]
"""A directory, where there is one of that name; else a hub id."""
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]{0,127}$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrOff = Annotated[
    Seconds | None,
    BeforeValidator(_none_if_off),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"enum": ["off", False, None]}]}),
]
FlagName = Annotated[str, AfterValidator(_flag)]
FlagValue = Annotated[bool | int | float | str | list[Any] | dict[str, Any], BeforeValidator(_given)]
ProcessorName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$"), AfterValidator(_processor)]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\s/?#]+)$")]
"""As browsers write it: scheme, host and port, and no slash behind them; or * for all."""
EndpointPath = Annotated[str, Field(pattern=r"^(/([\w.-]+|\{\w+\}))+$"), AfterValidator(_may_pass)]
Text = Annotated[str, WithJsonSchema({"type": ["string", "number"]})]
"""A text for which a number may stand."""
NO_OTHER_NAMES: JsonDict = {"additionalProperties": False}
"""What pydantic's schema of a map leaves out: names that fit no pattern are refused."""
Variables = Annotated[dict[str, Text], AfterValidator(_environment)]
