"""Multipart forms: the fields that the gateway has to read, and a body with another `model`.

A form is read in pieces, from memory or from a file. Only the fields that are asked for are copied, never a
file of the form.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from trimtab_server.errors import BadRequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FORM = b"multipart/form-data"
_PIECE_BYTES = 2**16
MAX_FIELD_BYTES = 65_536
"""Maximum size of a field that the gateway reads."""
MAX_PARTS = 1000
"""Maximum number of fields and files; the replica's own form parser has the same."""


@dataclass(frozen=True)
class Field:
    """A field of a form, and the position of its value in the body."""

    name: str
    value: str
    start: int
    end: int


def is_form(request: Request) -> bool:
    """Whether the request says that its body is a multipart form."""
    return parse_options_header(request.headers.get("content-type"))[0] == _FORM


def boundary_of(request: Request) -> bytes:
    """Return the boundary of a multipart form.

    Raises:
        BadRequestError: the content type names no boundary.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    if not options.get(b"boundary"):
        raise BadRequestError("Content-Type multipart/form-data must have a boundary", code="invalid_form")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):  # the replica would read other names than the gateway
        raise BadRequestError(
            f"`charset` of a form must be utf-8, got {charset.decode('latin-1')[:80]!r}", code="invalid_form"
        )
    return options[b"boundary"]


def read_fields(body: BinaryIO, boundary: bytes, names: Collection[str]) -> list[Field]:
    """Return the fields called one of `names`, in their order; files are passed over.

    Raises:
        BadRequestError: the body is not a form, or one of these fields is too large or not UTF-8.
    """
    reader = _Reader(names)
    parser = MultipartParser(boundary, reader.callbacks())
    body.seek(0)
    try:
        while piece := body.read(_PIECE_BYTES):
            reader.piece = piece
            parser.write(piece)
            reader.passed += len(piece)
    except FormParserError as error:
        raise BadRequestError(f"The body is not a valid form: {error}", code="invalid_form") from error
    return reader.fields


def write_with_value(body: BinaryIO, old: Field, value: str, output: BinaryIO) -> None:
    """Write the body with another value in the field `old`, and every other byte as it is."""
    body.seek(0)
    left = old.start
    while left > 0:
        left -= output.write(body.read(min(_PIECE_BYTES, left)))
    output.write(value.encode())
    body.seek(old.end)
    shutil.copyfileobj(body, output, _PIECE_BYTES)
    output.flush()


@dataclass
class _Reader:
    """Collects fields from the parser's callbacks, which report positions in the piece that is written."""

    names: Collection[str]
    fields: list[Field] = field(default_factory=list)
    piece: bytes = b""
    """The piece that the parser reads."""
    passed: int = 0
    """The bytes of the body before that piece."""
    _parts: int = 0
    _header: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _name: str | None = None
    """The name of the current part; None if it is a file or nobody asked for it."""
    _content: bytes = b""
    _start: int | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._add_content,
            "on_part_end": self._close,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequestError(f"The form has more than {MAX_PARTS} parts", code="invalid_form")
        self._disposition = self._content = b""
        self._name = self._start = None

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        self._name = name if name in self.names and b"filename" not in options else None

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return
        if self._start is None:
            # The end of the piece before, which looked like a boundary, comes in bytes of the parser's own.
            self._start = self.passed + (start if data is self.piece else start - end)
        self._content += data[start:end]
        if len(self._content) > MAX_FIELD_BYTES:
            raise BadRequestError(
                f"`{self._name}` in the form has more than {MAX_FIELD_BYTES} bytes", param=self._name
            )

    def _close(self) -> None:
        if self._name is None:
            return
        try:
            value = self._content.decode()
        except UnicodeDecodeError as error:
            raise BadRequestError(f"`{self._name}` in the form is not UTF-8", param=self._name) from error
        start = self._start or 0
        self.fields.append(Field(self._name, value, start, start + len(self._content)))
