"""The configuration: every key is known, and every default written once. The file and the environment say the
rest; docs/configuration.md lists the keys, docs/configuration.schema.json is made from what stands here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from trimtab_processors.pack import ONLY_V2_ROUTINGS, V2_ROUTINGS, ControlName
from trimtab_processors.settings import DEFAULT_TABLES, PluginSettings
from trimtab_server.config.sections import Cors, Limits, ReplicaSettings, Restarts, Section, Timeouts, Tls
from trimtab_server.config.sources import Override, describe, overlay, parse_yaml, read_environment
from trimtab_server.config.types import (
    ADMIN_KEYS_VARIABLE,
    API_KEYS_VARIABLE,
    NO_OTHER_NAMES,
    EndpointPath,
    FlagName,
    FlagValue,
    LocalPath,
    Location,
    ModelName,
    ProcessorName,
    SettingsError,
    Variables,
    WithoutTopLevel,
    require_own_options,
)
from trimtab_server.engines.vllm.flags import CONTROL_PROCESSOR, Runner


class ModelSettings(Section):
    """One model that is served."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    model: Location | None = None
    """A directory, or a hub id; none where all its replicas are elsewhere."""
    replicas: Annotated[tuple[ReplicaSettings, ...], Field(min_length=1)] = (ReplicaSettings(),)
    """Its replicas, which share its load."""
    args: dict[FlagName, FlagValue] = Field(default_factory=dict)
    """Flags for vLLM, by their own names."""
    env: Variables = Field(default_factory=dict)
    """Environment variables of the replica, beside those of the gateway."""
    runner: Runner = "v1"
    """vLLM's model runner: v1 aligns a control's text exactly, on the host; v2 (GPUs only) keeps asynchronous
    scheduling and speculative decoding, with alignment by segments."""
    processors: tuple[ProcessorName, ...] = (CONTROL_PROCESSOR,)
    """Logits processors, in the order in which they apply."""
    default_control: ControlName | None = None
    """The control of a request that names none."""
    controls: tuple[ControlName, ...] | None = None
    """Which controls the model offers; none given: all."""
    plugin: Annotated[PluginSettings, AfterValidator(require_own_options), WithoutTopLevel()] = Field(
        default_factory=PluginSettings
    )
    """Further options of the control plugin."""
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The program that is given vLLM's flags; none: vLLM in this Python."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.model is None and any(replica.url is None for replica in self.replicas):
            raise ValueError("`model` is needed, a directory or a hub id, unless every replica has a url")
        return self

    @model_validator(mode="after")
    def _has_the_routing(self) -> Self:
        if self.runner == "v2" and self.plugin.routing not in (None, *V2_ROUTINGS):
            raise ValueError(f"plugin.routing {self.plugin.routing!r}: {ONLY_V2_ROUTINGS}")
        return self


class Settings(Section):
    """The whole configuration."""

    models: Annotated[dict[ModelName, ModelSettings], Field(min_length=1, json_schema_extra=NO_OTHER_NAMES)]
    """What clients call them, and what they are."""
    controls: dict[ControlName, Location] = Field(default_factory=dict, json_schema_extra=NO_OTHER_NAMES)
    """What clients call them, and where their packs are: a directory, or a hub id."""
    host: str = "127.0.0.1"
    """The address on which the gateway listens; 0.0.0.0 for all of this machine's."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port on which the gateway listens; 0 for any that is free."""
    api_keys_file: LocalPath | None = None
    """API keys, one a line; lines that begin with # are comments. Those in TRIMTAB_API_KEYS, with commas
    between them, count too. Where there are none, nobody needs one."""
    admin_keys_file: LocalPath | None = None
    """The same, of those who may load and unload controls, with TRIMTAB_ADMIN_KEYS; nobody may where there
    are none."""
    protect_metrics: bool = False
    """Whether `/metrics` needs an API key too."""
    playground: bool = True
    """Whether `/` answers the playground, a page to try controls on; it needs no key, what it asks does."""
    control_roots: tuple[LocalPath, ...] = ()
    """Directories below which controls may be loaded while the gateway runs."""
    pass_through: tuple[EndpointPath, ...] = ()
    """Paths of vLLM's that clients may use without an admin key, beside those that the gateway passes on
    anyway, such as /is_sleeping; {name} stands for one segment."""
    limits: Limits = Limits()
    cors: Cors = Cors()
    tls: Tls | None = None
    """Certificates, for HTTPS; none: HTTP."""
    timeouts: Timeouts = Timeouts()
    restarts: Restarts = Restarts()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What the gateway's log tells."""
    log_format: Literal["text", "json"] = "text"
    """A line of text for each entry, or a JSON object."""
    log_prompts: bool = False
    """Whether the log shows what clients send, of each request its first 4 KiB."""
    tables: LocalPath = Field(default=DEFAULT_TABLES, validate_default=True)
    """Where mapping tables are kept."""
    logs: LocalPath = Field(default=Path("~/.cache/trimtab/logs"), validate_default=True)
    """Where the replicas' output goes."""

    @model_validator(mode="after")
    def _controls_exist(self) -> Self:
        for name, model in self.models.items():
            _require_known(f"models.{name}.controls", model.controls or (), self.controls)
            default = () if model.default_control is None else (model.default_control,)
            _require_known(f"models.{name}.default_control", default, self.controls_of(name))
        return self

    @model_validator(mode="after")
    def _controls_can_run(self) -> Self:
        for name, model in self.models.items():
            if self.can_steer(name):
                _require_generation(name, model)
        return self

    def can_steer(self, model: str) -> bool:
        """Whether the replicas of `model` have the plugin: it offers controls, or may be given some."""
        settings = self.models[model]
        may_be_given = bool(self.control_roots) and settings.controls is None
        return CONTROL_PROCESSOR in settings.processors and (may_be_given or bool(self.controls_of(model)))

    def controls_of(self, model: str) -> dict[str, str]:
        """The controls that `model` offers, and where their packs are."""
        chosen = self.models[model].controls
        return {n: place for n, place in self.controls.items() if chosen is None or n in chosen}

    @cached_property
    def api_keys(self) -> frozenset[str]:
        """The keys that clients may use; empty: nobody needs one.

        Raises:
            SettingsError: the file of keys can't be read, or holds none.
        """
        return _keys(API_KEYS_VARIABLE, "api_keys_file", self.api_keys_file)

    @cached_property
    def admin_keys(self) -> frozenset[str]:
        """The keys of those who may load and unload controls; empty: nobody may.

        Raises:
            SettingsError: the file of keys can't be read, or holds none.
        """
        return _keys(ADMIN_KEYS_VARIABLE, "admin_keys_file", self.admin_keys_file)


def load_settings(path: Path, options: Mapping[str, Any] | None = None) -> Settings:
    """Read the configuration at `path`; the environment comes before it, and `options` before both.

    Args:
        path: a YAML file; relative paths in the configuration start where it is.
        options: values of keys at the top, by what they are called on the command line: --KEY.

    Raises:
        SettingsError: the file can't be read, is no YAML, or a key or variable is unknown, missing or wrong.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path} is not a mapping of settings; it needs at least `models`")
    return make_settings(data, str(path), path.parent, options)


def make_settings(
    data: Mapping[str, Any], source: str, base: Path, options: Mapping[str, Any] | None = None
) -> Settings:
    """The configuration `data`, which comes from `source`, as `load_settings` makes it of a file in `base`.

    Raises:
        SettingsError: a key or variable is unknown, missing or wrong.
    """
    overrides, faults = read_environment(os.environ, Settings, (API_KEYS_VARIABLE, ADMIN_KEYS_VARIABLE))
    overrides += [Override(f"--{key}", (key,), value) for key, value in (options or {}).items()]
    settings = None
    try:
        settings = Settings.model_validate(overlay(data, overrides), context={"base": base})
    except ValidationError as error:
        faults += [describe(fault, Settings, overrides) for fault in error.errors(include_url=False)]
    if settings is None or faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise SettingsError(f"{source} is not a valid configuration:\n{listed}")
    return settings


def settings_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Settings.model_json_schema()}


def _require_known(place: str, names: tuple[str, ...], known: Mapping[str, str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{place}: no control {name!r}; there is: {', '.join(sorted(known)) or 'none'}")


def _require_generation(name: str, model: ModelSettings) -> None:
    """Refuse what vLLM can't do beside custom logits processors, before it says so in its own words."""
    flags = [
        ("args", model.args),
        *((f"replicas.{i}.args", each.args) for i, each in enumerate(model.replicas)),
    ]
    for where, flag, value in ((where, *pair) for where, args in flags for pair in args.items()):
        place = f"models.{name}.{where}.{flag}"
        if flag.startswith("spec") and model.runner == "v1":
            raise ValueError(
                f"{place}: vLLM's V1 model runner has no speculative decoding beside a control; leave the"
                " flag out, give this model `controls: []`, or set `runner: v2` on a GPU"
            )
        if (flag, value) == ("runner", "pooling") or (flag == "convert" and value not in ("none", "auto")):
            raise ValueError(
                f"{place}: a pooling model generates nothing that a control could steer; give this model"
                " `controls: []`"
            )


def _keys(variable: str, setting: str, path: Path | None) -> frozenset[str]:
    keys = {key.strip() for key in os.environ.get(variable, "").split(",")}
    if path is not None:
        keys |= _read_keys(setting, path)
    return frozenset(keys - {""})


def _read_keys(setting: str, path: Path) -> set[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting} {path} can't be read: {error}") from error
    keys = {line for line in lines if line and not line.startswith("#")}
    if not keys:
        raise SettingsError(f"{setting} {path} holds no key: write one a line, or leave the setting out")
    return keys
