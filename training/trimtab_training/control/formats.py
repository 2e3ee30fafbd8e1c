"""Reads records of the usual formats: a conversation each, or a prompt and the text that follows it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trimtab_training.control.recipe import DataSet

HUB_PREFIX = "hf://datasets/"
_COLUMNS = {
    "messages": {"messages": "messages"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "system": "system"},
    "sharegpt": {"conversations": "conversations", "system": "system"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion"},
    "text": {"text": "text"},
    "tofu": {"question": "question", "answer": "answer"},
}
"""Of each format its columns, under the names that they have in files if a recipe gives no others."""
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_SHOWN_CHARACTERS = 80

Message = dict[str, str]


class DataError(ValueError):
    """A data set can't be trained on; the message names the file, the record and what is wrong."""


@dataclass(frozen=True)
class Record:
    """One record.

    place: its file and number, for messages.
    messages: a conversation; None if the record is plain text.
    prompt, completion: plain text; the completion is what is learned.
    """

    place: str
    messages: tuple[Message, ...] | None = None
    prompt: str = ""
    completion: str = ""


def read_records(data_set: DataSet) -> list[Record]:
    """Read all records of a data set.

    Raises:
        DataError: a file can't be read, holds nothing, or a record lacks something.
    """
    columns = _columns(data_set)
    records = []
    for path in data_set.paths:
        rows = read_rows(local_file(path))
        for number, row in enumerate(rows, 1):
            place = Row(f"{path}, record {number}", row, columns, answered=data_set.answers == "given")
            records.append(_record(place, data_set.format))
    if not records:
        raise DataError(f"{', '.join(data_set.paths)}: the data set is empty. It needs at least one record")
    return records


def local_file(path: str) -> Path:
    """The file at `path`; one on the hub (`hf://datasets/OWNER/NAME/FILE`) is downloaded."""
    if not path.startswith(HUB_PREFIX):
        return Path(path)
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only where it is used

    parts = path.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) < 3:
        raise DataError(f"{path!r} must be {HUB_PREFIX}OWNER/NAME/FILE")
    owner, name, file = parts
    return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Read a file: CSV if it is named so, else a JSON list, or JSON objects in lines.

    Raises:
        DataError: it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = _json_list(path, text) if text.lstrip().startswith("[") else list(_json_lines(path, text))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {number}: must be an object, got {_shown(row)}")
    return rows


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        rows: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return rows


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error


def _columns(data_set: DataSet) -> dict[str, str]:
    known = _COLUMNS[data_set.format]
    for column in data_set.columns:
        if column not in known:
            near = get_close_matches(column, known, n=1) or [", ".join(known)]
            raise DataError(
                f"`columns`: the format `{data_set.format}` has no column `{column}`. Did you mean"
                f" `{near[0]}`?"
            )
    return known | data_set.columns


@dataclass(frozen=True)
class Row:
    """What a file holds of a record, under the format's own names for its columns.

    answered: whether its answers are read; else its last one is to be generated.
    """

    place: str
    values: Mapping[str, Any]
    columns: Mapping[str, str]
    answered: bool = True

    def text(self, column: str) -> str:
        """A text that has to be there.

        Raises:
            DataError: it is missing, empty, or no text.
        """
        text = self.optional(column)
        if not text.strip():
            raise DataError(f"{self.place}: `{self.columns[column]}` is missing or empty")
        return text

    def optional(self, column: str) -> str:
        value = self.values.get(self.columns[column])
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.place}: `{self.columns[column]}` must be a string, got {_shown(value)}")
        return value or ""

    def turns(self, column: str, role: str, content: str) -> Iterator[Message]:
        """The turns of a conversation: a list of objects with the keys `role` and `content`."""
        key = self.columns[column]
        turns = self.values.get(key)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{self.place}: `{key}` must be a list of turns, got {_shown(turns)}")
        for turn in turns:
            if not isinstance(turn, dict) or turn.get(role) not in _ROLES:
                allowed = ", ".join(_ROLES)
                raise DataError(
                    f"{self.place}: a turn's `{role}` must be one of {allowed}, got {_shown(turn)}"
                )
            text = turn.get(content)
            if not isinstance(text, str) or (not text.strip() and _ROLES[turn[role]] == "assistant"):
                raise DataError(f"{self.place}: a turn's `{content}` is missing or empty: {_shown(turn)}")
            yield {"role": _ROLES[turn[role]], "content": text}


def _record(row: Row, format_: str) -> Record:
    match format_:
        case "prompt_completion":
            return Record(row.place, None, row.text("prompt"), row.text("completion"))
        case "text":
            return Record(row.place, None, "", row.text("text"))
    messages = tuple(_messages(row, format_))
    if not row.answered:
        return Record(row.place, _question(row, messages))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.place}: no turn of the assistant, so there is no answer to learn")
    return Record(row.place, messages)


def _messages(row: Row, format_: str) -> Iterator[Message]:
    match format_:
        case "messages":
            yield from row.turns("messages", "role", "content")
        case "sharegpt":
            yield from _system(row)
            yield from row.turns("conversations", "from", "value")
        case "alpaca":
            yield from _system(row)
            asked: Sequence[str] = [row.text("instruction"), row.optional("input")]
            yield {"role": "user", "content": "\n".join(part for part in asked if part)}
            yield from _answer(row, "output")
        case "tofu":
            yield {"role": "user", "content": row.text("question")}
            yield from _answer(row, "answer")


def _answer(row: Row, column: str) -> Iterator[Message]:
    if row.answered:
        yield {"role": "assistant", "content": row.text(column)}


def _question(row: Row, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation up to its last turn of the user."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise DataError(f"{row.place}: no turn of the user, so there is no question to answer")
    return tuple(messages[: users[-1] + 1])


def _system(row: Row) -> Iterator[Message]:
    if system := row.optional("system"):
        yield {"role": "system", "content": system}


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN_CHARACTERS]
