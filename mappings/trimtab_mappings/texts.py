"""Texts to weigh and score tables by."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class TextError(ValueError):
    """A file that can't be read as text; the message names it and the place."""


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Read the documents in `paths`: of a `.jsonl` each line's `text`, of any other file the whole of it.

    Raises:
        TextError: a file can't be read, is not UTF-8, or a line of it is no object with a text.
    """
    texts: list[str] = []
    for path in paths:
        try:
            content = path.read_bytes().decode()  # as it is: reading as text would change its line ends
        except OSError as error:
            raise TextError(f"{path} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TextError(f"{path}: expected a text in UTF-8: {error}") from error
        texts += _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    return texts


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}, line {number}: expected JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TextError(f"{path}, line {number}: expected an object with a string 'text': {line:.60}")
        yield text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
