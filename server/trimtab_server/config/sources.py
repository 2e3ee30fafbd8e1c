"""Where a configuration comes from, and how its mistakes are told: YAML, the environment, what is declared.

Nothing here knows which keys there are; the declarations, pydantic models, are passed in as `root`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr
from pydantic_core import ErrorDetails

PREFIX = "TRIMTAB_"
BETWEEN = "__"
_SHOWN_CHARACTERS = 80

Place = tuple[int | str, ...]
"""Where a value stands: the keys and places in lists that lead to it."""


@dataclass(frozen=True)
class Override:
    """A value that comes from outside the file, and the place in the configuration where it belongs."""

    source: str
    """What it is called where it comes from."""
    path: tuple[str, ...]
    value: Any

    def holds(self, location: Place) -> bool:
        """Whether what stands at `location` is this value, or is in it."""
        if location[: len(self.path)] != self.path:
            return False
        value = self.value
        for key in location[len(self.path) :]:
            if not isinstance(value, dict):
                break
            if key not in value:
                return False
            value = value[key]
        return True


def parse_yaml(text: str) -> Any:
    """The value that `text` is in YAML.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice.
    """
    return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader


def read_environment(
    environment: Mapping[str, str], root: type[BaseModel], others: Iterable[str]
) -> tuple[list[Override], list[str]]:
    """What the variables `TRIMTAB_KEY` and `TRIMTAB_SECTION__KEY` say, those of whole sections first.

    Args:
        environment: names and values; an empty value is as good as none.
        root: the declarations.
        others: variables that begin like these and mean something else.

    Returns:
        The values, and what is wrong with variables, a line each.
    """
    overrides, faults = [], []
    names = sorted(name for name in environment if name.startswith(PREFIX) and name not in others)
    for name in names:
        if not environment[name].strip():
            continue
        path = tuple(name.removeprefix(PREFIX).lower().split(BETWEEN))
        try:
            overrides.append(Override(name, path, _read_variable(environment[name], path, root)))
        except ValueError as error:
            faults.append(f"{name}: {error}")
    return sorted(overrides, key=lambda override: len(override.path)), faults


def overlay(data: Any, overrides: Iterable[Override]) -> Any:
    """`data` with `overrides` in their order: maps are merged key by key, everything else is replaced."""
    for override in overrides:
        value = override.value
        for key in reversed(override.path):
            value = {key: value}
        data = _merged(data, value)
    return data


def describe(fault: ErrorDetails, root: type[BaseModel], overrides: Sequence[Override]) -> str:
    """One of pydantic's errors as a line: where, what is wrong, what is allowed."""
    location = tuple(part for part in fault["loc"] if part != "[key]")
    place = ".".join(map(str, location))
    sources = [override.source for override in overrides if override.holds(location)]
    if sources and fault["type"] != "missing":
        place = f"{sources[-1]}: {place}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"{place}: {_unknown(location, root)}"
    if fault["type"] in ("missing", "value_error"):
        return f"{place}: {message}" if place else message
    if SecretStr in _alternatives(_declared(location, root)):
        return f"{place}: {message}"
    return f"{place}: {message}, got {str(fault['input'])[:_SHOWN_CHARACTERS]!r}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the second of two equal keys win in silence; a second model of one name is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_variable(text: str, path: tuple[str, ...], root: type[BaseModel]) -> Any:
    """The value of the variable of the key at `path`: a text as it stands, everything else as YAML."""
    for length in range(1, len(path) + 1):
        above = path[: length - 1]
        section = _section(above, root)
        if section is None:
            place = ".".join(above)
            raise ValueError(
                f"no variable leads below {place}; write the value in YAML: "
                f"{PREFIX}{BETWEEN.join(above).upper()}='...'"
            )
        if path[length - 1] not in section.model_fields:
            raise ValueError(f"{'.'.join(path[:length])}: {_unknown(path[:length], root)}")
    declared = set(_alternatives(_declared(path, root)))
    if NoneType in declared and text.strip() == "null":
        return None
    if declared <= {str, Path, SecretStr, NoneType}:
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{'.'.join(path)}: not YAML: {' '.join(str(error).split())}") from error


def _unknown(location: Place, root: type[BaseModel]) -> str:
    section = _section(location[:-1], root) or root
    return f"unknown key; allowed here: {', '.join(sorted(section.model_fields))}"


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _section(location: Place, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that is declared at `location`, None where something else is."""
    declared = _alternatives(_declared(location, root))
    return next((kind for kind in declared if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _declared(location: Place, root: type[BaseModel]) -> Any:
    """The annotation of the value at `location`; None where nothing is declared."""
    declared: Any = root
    for key in location:
        below = (_below(kind, key) for kind in _alternatives(declared))
        declared = next((kind for kind in below if kind is not None), None)
    return declared


def _below(kind: Any, key: int | str) -> Any:
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    field = getattr(kind, "model_fields", {}).get(key)
    return None if field is None else field.annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, bare of what else their annotation says; texts of a choice are str."""
    return tuple(_each(annotation))


def _each(annotation: Any) -> Iterator[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _each(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _each(argument)
    elif origin is Literal:
        yield from map(type, arguments)
    else:
        yield annotation
