"""The sections of a configuration below its top level, without the models."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from trimtab_processors.parameters import MAX_CONTROLS
from trimtab_server.config.types import (
    FlagName,
    FlagValue,
    LocalPath,
    Origin,
    Seconds,
    SecondsOrOff,
    Text,
    Variables,
    require_pattern,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Timeouts(Section):
    """How long the gateway waits, in seconds."""

    startup: Seconds = 1800
    """For a replica to answer after its start."""
    connect: Seconds = 10
    """For a replica to take a connection."""
    body: Seconds = 300
    """For the whole body of a request; 408 beyond."""
    idle: Seconds = 3600
    """For the next piece of a replica's answer."""
    probe: Seconds = 5
    """For a replica's health, models and metrics."""
    drain: Seconds = 30
    """For requests in flight when the gateway shuts down."""
    stop: Seconds = 20
    """For a replica's processes to end by themselves before they are killed."""
    keep_alive: Annotated[int, Field(gt=0)] = 75
    """For the next request on an idle client connection, in whole seconds. It must be longer than the idle
    timeout of a load balancer in front, so that no request meets a connection that is being closed."""
    unresponsive: SecondsOrOff = 300
    """For a sign of life of a replica started here, before it is started again; off: for ever."""


class Restarts(Section):
    """What happens when a replica ends by itself; delays in seconds."""

    attempts: Annotated[int, Field(ge=0)] = 5
    """Restarts in a row before the replica is given up."""
    backoff: Seconds = 1
    """The delay before the first restart; it doubles with each."""
    longest: Seconds = 60
    """The longest delay."""
    stable: Seconds = 60
    """A replica that answered for this long starts the count anew."""

    def delay(self, failures: int) -> float:
        """The seconds to wait after so many failures in a row, one at least."""
        doublings = min(failures - 1, 64)
        return min(self.backoff * 2.0**doublings, self.longest)


class Limits(Section):
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


class Cors(Section):
    """Which pages of other origins a browser lets use the gateway; none unless they stand here."""

    allow_origins: tuple[Origin, ...] = ()
    """Origins such as https://chat.example.org; * for all."""
    allow_origin_regex: Annotated[str, AfterValidator(require_pattern)] | None = None
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


class Tls(Section):
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


class ReplicaSettings(Section):
    """One replica of a model: a vLLM server that is started here, or one elsewhere."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")] | None = None
    """Where a server elsewhere answers; it serves the model by the same name, and has the plugin."""
    key_variable: str | None = None
    """The environment variable with the API key of the server elsewhere."""
    admin_key_variable: str | None = None
    """The environment variable with the server's admin key, where controls are to be loaded into it."""
    devices: tuple[Annotated[int, Field(ge=0)] | str, ...] | None = None
    """GPUs of a replica started here (CUDA_VISIBLE_DEVICES)."""
    cpus: Text | None = None
    """Cores of a replica started here, on CPUs, such as 0-3 (VLLM_CPU_OMP_THREADS_BIND)."""
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
            raise ValueError(f"{', '.join(started)}: only for a replica that is started here, not at a url")
        if self.url is None and self.key_variable is not None:
            raise ValueError("key_variable: only for a replica at a url")
        if self.url is None and self.admin_key_variable is not None:
            raise ValueError("admin_key_variable: only for a replica at a url")
        return self
