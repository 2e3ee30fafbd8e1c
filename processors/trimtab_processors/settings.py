"""What the plugin is told: by vLLM's configuration when it starts, and held against it by each request.

vLLM's front end loads this module for every server, so it imports neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab_processors.pack import ControlName, RoutingName, load_pack
from trimtab_processors.parameters import Parameters, ParametersError

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "trimtab"
DEFAULT_TABLES = Path("~/.cache/trimtab/tables")
DEFAULT_CACHE_BYTES = 256 * 2**20
DEFAULT_KL_EVERY = 16
_LOGPROBS_MODE = "raw_logprobs"
"""vLLM's default."""


class PluginSettings(BaseModel):
    """What `--additional-config` says under `trimtab`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    controls: dict[ControlName, str] = Field(default_factory=dict)
    """Names, and where their packs are: a directory or a hub id."""
    tables: Path = DEFAULT_TABLES
    """Where mapping tables are kept."""
    cache_bytes: Annotated[int, Field(gt=0)] = DEFAULT_CACHE_BYTES
    """The keys and values of each control, in bytes."""
    control_cpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Cores on which the controls run beside the target's forward; none: before it, on the engine's own."""
    control_roots: tuple[Path, ...] = ()
    """Directories below which controls may be loaded while the engine runs; none: no control is loaded."""
    neutral: bool = True
    """Unmapped tokens get the mean shift; false: none, as in the reference implementation."""
    routing: RoutingName | None = None
    """How shifts reach the target's tokens, where a request does not say; None: as each pack says."""
    kl_every: Annotated[int, Field(ge=0)] = DEFAULT_KL_EVERY
    """On one controlled step of so many, how far control moves the target is measured; 0: on none."""


def read_settings(additional_config: Any) -> PluginSettings:
    """Read the plugin's part of vLLM's additional configuration.

    Raises:
        ValueError: a key is unknown or wrong; the message names it.
    """
    own = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    try:
        return PluginSettings.model_validate(own)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, (KEY, *e['loc'])))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"--additional-config: {faults}") from error


@cache
def command_line_settings() -> PluginSettings | None:
    """The settings on this process's command line.

    vLLM gives its front end, where requests are validated, no way to the configuration of the engine.

    Returns:
        None where the process was not started with `--additional-config`, as in offline use.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--additional-config", "--additional_config", type=json.loads)
    known, _ = parser.parse_known_args(sys.argv[1:])
    return None if known.additional_config is None else read_settings(known.additional_config)


@cache
def command_line_logprobs_mode() -> str | None:
    """The mode of log-probabilities by this process's command line, or vLLM's default.

    Returns:
        None if the process was not started with `--additional-config`, as in offline use, or if it reads
        flags from a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--logprobs-mode", "--logprobs_mode", default=_LOGPROBS_MODE)
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(sys.argv[1:])
    return None if command_line_settings() is None or known.config is not None else str(known.logprobs_mode)


@cache
def known_controls() -> dict[str, str] | None:
    """The controls that a request may name, and where their packs are: those of the command line, and what
    was loaded since.

    Returns:
        None where the process does not know, see `command_line_settings`.
    """
    settings = command_line_settings()
    return None if settings is None else dict(settings.controls)


@cache
def control_vocab_size(location: str) -> int:
    """The least vocabulary of the models of the pack at `location`."""
    from transformers import AutoConfig  # noqa: PLC0415 - heavy: only where it is used

    configs = (AutoConfig.from_pretrained(part.model) for part in load_pack(location).components)
    return min(int(config.get_text_config().vocab_size) for config in configs)


def validate(parameters: Parameters, controls: Mapping[str, str]) -> None:
    """Hold a request's parameters against the controls that there are, name to pack.

    Raises:
        ParametersError: the control is unknown, or its prompt has a token that it does not.
    """
    location = controls.get(parameters.control)
    if location is None:
        known = ", ".join(sorted(controls)) or "none"
        raise ParametersError(f"trimtab_control: no control {parameters.control!r} here, there is: {known}")
    if parameters.prompt and (highest := max(parameters.prompt)) >= control_vocab_size(location):
        raise ParametersError(
            f"trimtab_prompt: token {highest} is not below the {control_vocab_size(location)}"
            f" of {parameters.control!r}"
        )
