"""A pack: the directory in which a control comes, and its manifest `trimtab.json`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST = "trimtab.json"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_STRENGTH = 10.0

PM_MINED, PATH, PIECES = "pm-mined", "path", "pieces"
DEFAULT_ROUTING = PATH
"""Used when neither the request nor the model's configuration nor the pack names one."""

V2_ROUTINGS = (PM_MINED, PATH)
ONLY_V2_ROUTINGS = (
    f"vLLM's V2 model runner has only the routings {PM_MINED!r} and {PATH!r}: name one of them, or take its"
    " V1 model runner"
)

RESERVED_NAMES = frozenset({"on", "off"})
"""What a request says of control in general, where it could also name one."""


def _not_reserved(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is no name for a control: it has a meaning of its own")
    return name


ControlName = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_not_reserved)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]
RoutingName = Literal["pm-mined", "path", "pieces"]
"""The name of a routing: the way in which shifts reach the target's tokens."""


class PackError(ValueError):
    """A pack that can't be read; the message names the file and what is wrong."""


class Component(BaseModel):
    """One model of a pack; the pack's shift is the sum of `weight` times the logits of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "."
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class Pack(BaseModel):
    """The manifest of a control. Every field has a default, so that a bare model directory is a pack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ControlName = "control"
    strength: Strength = 1.0
    routing: RoutingName | None = None
    """None: the model's, or the default."""
    description: str = ""
    training: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | None = None
    components: tuple[Component, ...] = (Component(),)

    @field_validator("components")
    @classmethod
    def _at_least_one(cls, components: tuple[Component, ...]) -> tuple[Component, ...]:
        if not components:
            raise ValueError("a pack needs at least one component")
        return components

    def save(self, directory: Path) -> None:
        """Write the manifest into `directory`, where the model's own files stand."""
        (directory / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_pack(location: str) -> Pack:
    """Read the pack at `location`, a directory or a hub id; without a manifest it has the defaults.

    Component paths come back resolved: `.` and relative paths against the pack's directory, anything that is
    not a directory there as a hub id.

    Raises:
        PackError: the manifest is not JSON, or a key of it is unknown or out of range.
    """
    directory = Path(location)
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return Pack(components=(Component(model=location),))
    try:
        pack = Pack.model_validate_json(manifest.read_text(encoding="utf-8"))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise PackError(f"{manifest} is not a valid manifest: {faults}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"{manifest} can't be read: {error}") from error
    resolved = tuple(
        component.model_copy(update={"model": _resolve(directory, component.model)})
        for component in pack.components
    )
    return pack.model_copy(update={"components": resolved})


def pack_below(location: str, roots: Sequence[Path]) -> Path:
    """The real path of a pack that stands below one of `roots`, with all that belongs to it.

    Args:
        location: a directory.
        roots: directories.

    Raises:
        PackError: it is no directory, it or one of its files leads elsewhere, or it names a model elsewhere.
    """
    try:
        return _below(location, [root.resolve() for root in roots])
    except (OSError, ValueError, RuntimeError) as error:  # too long, not readable, a link to itself
        if isinstance(error, PackError):
            raise
        raise PackError(f"{location[:200]!r} can't be read: {error}") from error


def _below(location: str, allowed: Sequence[Path]) -> Path:
    directory = Path(location).resolve()
    if not any(directory.is_relative_to(root) for root in allowed):
        raise PackError(
            f"{location[:200]!r} is not below any of the directories that controls are loaded from"
        )
    if not directory.is_dir():
        raise PackError(f"{location[:200]!r} is no directory")
    _require_inside(directory, allowed)
    for component in load_pack(str(directory)).components:
        part = Path(component.model)
        if not part.is_absolute():
            raise PackError(f"its component {component.model[:200]!r} is no directory below it")
        _require_inside(part, allowed)
    return directory


def _require_inside(directory: Path, allowed: Sequence[Path]) -> None:
    for path in (directory, *directory.iterdir()):
        if not any(path.resolve().is_relative_to(root) for root in allowed):
            raise PackError(f"{path.name[:200]!r} leads out of the directories that controls are loaded from")


def _resolve(directory: Path, model: str) -> str:
    path = directory / model
    return str(path.resolve()) if path.is_dir() else model
