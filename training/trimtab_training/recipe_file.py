"""Reads a recipe: a YAML file whose keys a pydantic model declares, and options that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

_SHOWN_CHARACTERS = 80


class RecipeError(ValueError):
    """A recipe can't be used; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Recipe = TypeVar("Recipe", bound=BaseModel)


def read_recipe(model: type[Recipe], path: Path | None, arguments: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, and put the options of a command line in place of its keys.

    Args:
        model: the declaration.
        path: a YAML file; None: all keys are in `arguments`.
        arguments: `--key value` or `--key=value`, with dots in keys of sections. Values are YAML;
            hyphens in keys are underscores.

    Raises:
        RecipeError: the file can't be read, or a key or value is wrong.
    """
    return parse_recipe(model, read_keys(path, arguments))


def read_keys(path: Path | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Read the keys of a recipe without their declaration; the arguments are those of `read_recipe`.

    Raises:
        RecipeError: the file or an option can't be read.
    """
    data = {} if path is None else _read_file(path)
    for key, value in _options(arguments):
        _put(data, key, value)
    return data


def parse_recipe(model: type[Recipe], data: Mapping[str, Any]) -> Recipe:
    """Make a recipe of its keys.

    Raises:
        RecipeError: a key or value is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [_describe(fault, model) for fault in error.errors()]
        raise RecipeError("\n".join(faults)) from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold keys and values, got {_shown(data)}")
    return data


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise RecipeError(f"An option begins with `--`, got {_shown(argument)}. Write `--key value`")
        key, equals, text = argument[2:].partition("=")
        value = text if equals else next(rest, None)
        if value is None:
            raise RecipeError(f"`--{key}` needs a value. Write `--{key} value`")
        yield key.replace("-", "_"), _parse(key, value)


def _parse(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"`--{key}` must be YAML, got {_shown(text)}") from error


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a section, or an item of a list, to `value`: `target.device`, `groups.0.name`."""
    *sections, last = key.split(".")
    node: Any = data
    for section in sections:
        place = _place(node, section, key)
        if isinstance(node, dict) and not isinstance(node.get(place), dict | list):
            node[place] = {}
        node = node[place]
    node[_place(node, last, key)] = value


def _place(node: Any, part: str, key: str) -> Any:
    """Where `part` of an option's key leads in a section or a list."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise RecipeError(f"`--{key}` leads nowhere: {_shown(node)} has no `{part}`")


def _describe(fault: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    match fault["type"]:
        case "extra_forbidden":
            return f"`{place}` is not a key of a recipe. {_nearest(fault['loc'], model)}"
        case "missing":
            return f"`{place}` is missing"
        case "value_error":
            return f"`{place}`: {message}" if place else message
    return f"`{place}`: {message}, got {_shown(fault['input'])}"


def _nearest(location: Sequence[int | str], model: type[BaseModel]) -> str:
    keys = _keys(location[:-1], model)
    near = get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
    return f"Did you mean `{near[0]}`?" if near else f"Available keys: {', '.join(sorted(keys))}"


def _keys(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """The keys of the section at `location`."""
    sections = [model]
    for part in location:
        fields = [section.model_fields.get(str(part)) for section in sections]
        inner = [found for field in fields if field is not None for found in _sections(field.annotation)]
        sections = inner or sections  # a place in a list, or pydantic's name of an alternative
    return [key for section in sections for key in section.model_fields]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN_CHARACTERS]
