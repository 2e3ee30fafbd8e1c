"""The configuration: every key is known, and every default written once. The file and the environment say the
rest; docs/configuration.md lists the keys, docs/configuration.schema.json is made from what stands here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema

from trimtab_processors.pack import ONLY_PM_MINED, PM_MINED, ControlName
from trimtab_processors.parameters import MAX_CONTROLS
from trimtab_processors.settings import DEFAULT_TABLES, PluginSettings
from trimtab_server.config.sources import Override, describe, overlay, parse_yaml, read_environment
from trimtab_server.engines.vllm.endpoints import is_disabled

Runner = Literal["v1", "v2"]
CONTROL_PROCESSORS: Mapping[Runner, str] = {
    "v1": "trimtab_processors.vllm_v1:ControlProcessor",
    "v2": "trimtab_processors.vllm_v2:ControlProcessor",
}
"""The plugin for each of vLLM's model runners."""
CONTROL_PROCESSOR = CONTROL_PROCESSORS["v1"]
"""Its name in a model's list of processors, whatever the runner."""
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
API_KEYS_VARIABLE = "TRIMTAB_API_KEYS"
ADMIN_KEYS_VARIABLE = "TRIMTAB_ADMIN_KEYS"
RESERVED_FLAGS = frozenset(
    {
        *("model", "served-model-name", "uds", "host", "port", "logits-processors", "additional-config"),
        *("config", "headless", "grpc", "root-path", "api-key", "api-server-count", "worker-extension-cls"),
        *("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs"),
    }
)
"""Flags of vLLM that Trimtab sets itself, or that would put the worker out of its reach."""

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
    if name == CONTROL_PROCESSORS["v2"]:
        raise ValueError(
            f"write {CONTROL_PROCESSOR!r} and set `runner: v2`, which puts the right one in its place"
        )
    return name


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


def _may_pass(path: str) -> str:
    if is_disabled(path):
        raise ValueError(f"{path} would bypass controls and limits, and can't be opened")
    return path


class _WithoutTop:
    """The schema of the plugin's options without those that stand at the top of the configuration."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference)["properties"]
        for name in _AT_THE_TOP & properties.keys():
            del properties[name]
        return reference


def _own_options(plugin: PluginSettings) -> PluginSettings:
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
_ONLY: JsonDict = {"additionalProperties": False}
"""What pydantic's schema of a map leaves out: names that fit no pattern are refused."""
Variables = Annotated[dict[str, Text], AfterValidator(_environment)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Timeouts(_Section):
    """How long the gateway waits, in seconds."""

    startup: Seconds = 1800
    """For a worker to answer after its start."""
    connect: Seconds = 10
    """For a worker to take a connection."""
    body: Seconds = 300
    """For the whole body of a request; 408 beyond."""
    idle: Seconds = 3600
    """For the next piece of a worker's answer."""
    probe: Seconds = 5
    """For a worker's health, models and metrics."""
    drain: Seconds = 30
    """For requests in flight when the gateway shuts down."""
    stop: Seconds = 20
    """For a worker's processes to end by themselves before they are killed."""
    keep_alive: Annotated[int, Field(gt=0)] = 75
    """For the next request on an idle client connection, in whole seconds. It must be longer than the idle
    timeout of a load balancer in front, so that no request meets a connection that is being closed."""
    unresponsive: SecondsOrOff = 300
    """For a sign of life of a worker started here, before it is started again; off: for ever."""


class Restarts(_Section):
    """What happens when a worker ends by itself; delays in seconds."""

    attempts: Annotated[int, Field(ge=0)] = 5
    """Restarts in a row before the worker is given up."""
    backoff: Seconds = 1
    """The delay before the first restart; it doubles with each."""
    longest: Seconds = 60
    """The longest delay."""
    stable: Seconds = 60
    """A worker that answered for this long starts the count anew."""

    def delay(self, failures: int) -> float:
        """The seconds to wait after so many failures in a row, one at least."""
        doublings = min(failures - 1, 64)
        return min(self.backoff * 2.0**doublings, self.longest)


class Limits(_Section):
    """What clients can't go beyond."""

    body_bytes: Annotated[int, Field(gt=0)] = 32 * 2**20
    """The body of one request; 413 beyond."""
    body_bytes_total: Annotated[int, Field(gt=0)] = 256 * 2**20
    """Bodies above 64 KiB in memory at once, until their answers begin; a further one is read when there is
    room for it."""
    control_prompt_bytes: Annotated[int, Field(gt=0)] = 2**20
    """The conversation that a control reads, as JSON without images and audio; 413 beyond, before any of it
    is tokenized."""
    control_prompt_tokens: Annotated[int, Field(gt=0)] = 131_072
    """A control's own prompt, in the control's tokens; 413 beyond."""
    concurrent: Annotated[int, Field(gt=0)] = 512
    """Requests of one model under way at once; what comes beyond waits."""
    queued: Annotated[int, Field(ge=0)] = 512
    """Requests of one model that wait; 429 beyond."""
    controls: Annotated[int, Field(gt=0)] = 64
    """Controls that there are at once, loaded ones among them."""
    controls_per_request: Annotated[int, Field(gt=0, le=MAX_CONTROLS)] = 4
    """Controls that one request may sum, at most 8."""
    aliases: Annotated[int, Field(ge=0)] = 1024
    """Aliases `model:control` that `/v1/models` lists."""


class Cors(_Section):
    """Which pages of other origins a browser lets use the gateway; none unless they stand here."""

    allow_origins: tuple[Origin, ...] = ()
    """Origins such as https://chat.example.org; * for all."""
    allow_origin_regex: Annotated[str, AfterValidator(_pattern)] | None = None
    """Further origins, as a regular expression that matches a whole one."""
    allow_credentials: bool = False
    """Whether browsers may send cookies along; not to be had for all origins."""
    max_age: Annotated[int, Field(ge=0)] = 600
    """For how many seconds a browser need not ask again."""

    @model_validator(mode="after")
    def _credentials_are_for_some(self) -> Self:
        if self.allow_credentials and "*" in self.allow_origins:
            raise ValueError("allow_credentials: not for all origins (*); name those that are meant")
        return self

    @property
    def is_open(self) -> bool:
        """Whether there is an origin that may."""
        return bool(self.allow_origins) or self.allow_origin_regex is not None


class Tls(_Section):
    """How the gateway speaks HTTPS; without this section it speaks HTTP."""

    certfile: LocalPath
    """The certificate, PEM, with those that lead to its root."""
    keyfile: LocalPath | None = None
    """Its key, PEM; none: it is in `certfile`."""
    keyfile_password: SecretStr | None = None
    """The password of an encrypted key; better in TRIMTAB_TLS__KEYFILE_PASSWORD than in a file."""
    require_client_certificate: bool = False
    """Whether clients need a certificate of their own."""
    ca_certs: LocalPath | None = None
    """The authorities, PEM, of whom clients may have it."""
    ciphers: str | None = None
    """OpenSSL's list of ciphers for TLS 1.2; none: Python's."""

    @model_validator(mode="after")
    def _authorities_are_for_clients(self) -> Self:
        if self.require_client_certificate != (self.ca_certs is not None):
            raise ValueError("`require_client_certificate: true` and `ca_certs` go together")
        return self


class Replica(_Section):
    """One worker of a model: a vLLM server that is started here, or one elsewhere."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")] | None = None
    """Where a server elsewhere answers; it serves the model by the same name, and has the plugin."""
    key_variable: str | None = None
    """The environment variable with the API key of the server elsewhere."""
    admin_key_variable: str | None = None
    """The environment variable with the server's admin key, where controls are to be loaded into it."""
    devices: tuple[Annotated[int, Field(ge=0)] | str, ...] | None = None
    """GPUs of a worker started here (CUDA_VISIBLE_DEVICES)."""
    cpus: Text | None = None
    """Cores of a worker started here, on CPUs, such as 0-3 (VLLM_CPU_OMP_THREADS_BIND)."""
    args: dict[FlagName, FlagValue] = Field(default_factory=dict)
    """Flags for vLLM beside the model's, and before them."""
    env: Variables = Field(default_factory=dict)
    """Environment variables beside the model's, and before them."""

    @property
    def key_variables(self) -> dict[str, str]:
        """The environment variables that it names, by the keys that name them."""
        named = {"key_variable": self.key_variable, "admin_key_variable": self.admin_key_variable}
        return {key: variable for key, variable in named.items() if variable is not None}

    @model_validator(mode="after")
    def _here_or_elsewhere(self) -> Self:
        started = sorted(self.model_fields_set & {"devices", "cpus", "args", "env"})
        if self.url is not None and started:
            raise ValueError(f"{', '.join(started)}: only for a worker that is started here, not at a url")
        if self.url is None and self.key_variable is not None:
            raise ValueError("key_variable: only for a worker at a url")
        if self.url is None and self.admin_key_variable is not None:
            raise ValueError("admin_key_variable: only for a worker at a url")
        return self


class ModelSettings(_Section):
    """One model that is served."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    model: Location | None = None
    """A directory, or a hub id; none where all its replicas are elsewhere."""
    replicas: Annotated[tuple[Replica, ...], Field(min_length=1)] = (Replica(),)
    """Its workers, which share its load."""
    args: dict[FlagName, FlagValue] = Field(default_factory=dict)
    """Flags for vLLM, by their own names."""
    env: Variables = Field(default_factory=dict)
    """Environment variables of the worker, beside those of the gateway."""
    runner: Runner = "v1"
    """vLLM's model runner: v1 aligns a control's text exactly, on the host; v2 (GPUs only) keeps asynchronous
    scheduling and speculative decoding, with alignment by segments."""
    processors: tuple[ProcessorName, ...] = (CONTROL_PROCESSOR,)
    """Logits processors, in the order in which they apply."""
    default_control: ControlName | None = None
    """The control of a request that names none."""
    controls: tuple[ControlName, ...] | None = None
    """Which controls the model offers; none given: all."""
    plugin: Annotated[PluginSettings, AfterValidator(_own_options), _WithoutTop()] = Field(
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
        if self.runner == "v2" and self.plugin.routing not in (None, PM_MINED):
            raise ValueError(f"plugin.routing {self.plugin.routing!r}: {ONLY_PM_MINED}")
        return self


class Settings(_Section):
    """The whole configuration."""

    models: Annotated[dict[ModelName, ModelSettings], Field(min_length=1, json_schema_extra=_ONLY)]
    """What clients call them, and what they are."""
    controls: dict[ControlName, Location] = Field(default_factory=dict, json_schema_extra=_ONLY)
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
    """Where the workers' output goes."""

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
        """Whether the workers of `model` have the plugin: it offers controls, or may be given some."""
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
