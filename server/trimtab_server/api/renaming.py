"""Answers to an alias: `model` in them becomes the name that the client asked for; every other byte stays.

A scanner follows the structure of the JSON as it passes. It never takes generated text for a key, and it
holds back only the beginning of a short string whose end has not come yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from functools import partial

from trimtab_server.engines.vllm.endpoints import MESSAGES, RESPONSES

Path = tuple[str | None, ...]

TOP: Path = ("model",)
_NESTED: dict[str, Path] = {RESPONSES: ("response", "model"), MESSAGES: ("message", "model")}
_DEPTHS = 2
"""Keys deeper than this are never looked for."""
_MIN_HELD = 64
_TOKEN = re.compile(rb'"(?:[^"\\]*+(?:\\.[^"\\]*+)*+")?|[{}\[\]:]', re.DOTALL)
"""A whole string, the opening quote of one whose end has not come, a bracket or a colon. There are no commas,
so that arrays of numbers are passed over at once."""
_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+(")?', re.DOTALL)
"""The rest of a string, with its closing quote if it has come."""
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\r|\n|\Z)")
_DATA = b"data:"


def event_paths(endpoint: str) -> frozenset[Path]:
    """Return where the events of a stream of `endpoint` name the model."""
    return frozenset({TOP, *(path for prefix, path in _NESTED.items() if endpoint.startswith(prefix))})


def rename(document: bytes, base: str, asked: str) -> bytes:
    """Return a JSON document in which the top-level `model` is `asked` if it was `base`."""
    renaming = Renaming(base, asked)
    return renaming.feed(document) + renaming.end()


class Renaming:
    """Replaces `base` by `asked` at some paths of one JSON document, which arrives in pieces of any size."""

    def __init__(self, base: str, asked: str, paths: Collection[Path] = (TOP,)) -> None:
        self._base = base
        self._asked = json.dumps(asked).encode()
        self._paths = frozenset(paths)
        self._max_held = max(_MIN_HELD, 6 * len(base) + 2)
        """A string that is longer, even with every character escaped, is neither a key nor the name."""
        self._held = b""
        self._in_string = False
        """Whether the rest of a long string comes next."""
        self._depth = 0
        self._keys: list[str | None] = [None] * _DEPTHS
        self._last: str | None = None
        """The last string, if it may be a key."""
        self._expected = False
        """Whether the next string is the name of the model."""
        self._done = False

    def feed(self, piece: bytes) -> bytes:
        """Take a piece of the document. Returns what can be passed on."""
        if self._done:
            return piece
        piece, self._held = self._held + piece, b""
        return b"".join(self._parts(piece))

    def end(self) -> bytes:
        """Return what is still held back. The document, or this line of it, is over."""
        held, self._held = self._held, b""
        self._in_string = False
        return held

    def _parts(self, piece: bytes) -> Iterator[bytes]:
        passed = at = 0
        while not self._done:
            if self._in_string:
                rest = _REST.match(piece, at)
                at = len(piece) if rest is None else rest.end()
                self._in_string = rest is None or rest[1] is None
            token = None if self._in_string else _TOKEN.search(piece, at)
            if self._expected and piece[at : token and token.start()].strip():
                self._expected = False  # the value is a number or a word
            if token is None:
                at = at if self._in_string else len(piece)
                break
            at = token.end()
            if token[0] == b'"' and len(piece) - token.start() <= self._max_held:
                at = token.start()
                break
            if self._take(token[0]):
                yield piece[passed : token.start()]
                yield self._asked
                passed = at
        at = len(piece) if self._done else at
        yield piece[passed:at]
        self._held = piece[at:]

    def _take(self, token: bytes) -> bool:
        """Follow the structure; return whether the token is the name to be replaced."""
        if token[:1] == b'"':
            return self._take_string(token)
        if token == b":":
            self._take_key()
        else:
            self._expected = False
            self._depth += (token in b"{[") - (token in b"}]")
        self._last = None
        return False

    def _take_string(self, token: bytes) -> bool:
        expected, self._expected = self._expected, False
        self._in_string = token == b'"'
        if expected and _text(token) == self._base and not self._in_string:
            self._done = self._paths == {TOP}
            return True
        self._last = _text(token) if self._depth <= _DEPTHS and len(token) <= self._max_held else None
        return False

    def _take_key(self) -> None:
        if 1 <= self._depth <= _DEPTHS:
            self._keys[self._depth - 1 :] = [self._last, *[None] * (_DEPTHS - self._depth)]
            self._expected = tuple(self._keys[: self._depth]) in self._paths


class EventRenaming:
    """Does the same in a stream of server-sent events, each of which has one JSON document as its data."""

    def __init__(self, base: str, asked: str, paths: Collection[Path]) -> None:
        self._new = partial(Renaming, base, asked, paths)
        self._data = self._new()
        self._begun = b""
        """The beginning of a line, as long as it may become a line of data."""
        self._is_data: bool | None = None
        """None: the beginning of the line has not said it yet."""
        self._line_is_empty = True
        self._after_cr = False

    def feed(self, piece: bytes) -> bytes:
        """Take a piece of the stream. Returns what can be passed on."""
        return b"".join(self._parts(piece))

    def end(self) -> bytes:
        """Return what is still held back. The stream is over."""
        begun, self._begun = self._begun, b""
        return begun + self._data.end()

    def _parts(self, piece: bytes) -> Iterator[bytes]:
        for text, ending in _LINE.findall(piece):
            if text:
                yield self._text(text)
            if ending:
                yield self._end_line(ending, follows_cr=self._after_cr and not text)
            if text or ending:
                self._after_cr = ending == b"\r"

    def _text(self, text: bytes) -> bytes:
        self._line_is_empty = False
        if self._is_data is None:
            text, self._begun = self._begun + text, b""
            if len(text) < len(_DATA) and _DATA.startswith(text):
                self._begun = text
                return b""
            self._is_data = text.startswith(_DATA)
            if self._is_data:
                return _DATA + self._data.feed(text.removeprefix(_DATA))
        return self._data.feed(text) if self._is_data else text

    def _end_line(self, ending: bytes, *, follows_cr: bool) -> bytes:
        if follows_cr and ending == b"\n":
            return ending
        held = self.end()
        if self._line_is_empty:
            self._data = self._new()
        self._is_data, self._line_is_empty = None, True
        return held + ending


def _text(token: bytes) -> str | None:
    """What a string of JSON says; None if it is not valid."""
    try:
        text = json.loads(token)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
