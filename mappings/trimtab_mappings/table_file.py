"""The file of a mapping table: its format, what is checked when it is read, and the messages of refusals."""

from __future__ import annotations

import hashlib
import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab_mappings.pieces import PieceTrie, pieces_fault
from trimtab_mappings.trie import Trie, trie_fault

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT = "trimtab-mapping"
VERSION = 5
TENSORS = {
    "mapping": np.int32,
    "exact": np.bool_,
    "segment_offsets": np.int32,
    "segment_ids": np.int32,
    "target_offsets": np.int32,
    "target_bytes": np.uint8,
    "control_offsets": np.int32,
    "control_bytes": np.uint8,
    **{f"trie_{column}": np.int32 for column in Trie._fields},
    **{f"pieces_{column}": np.int32 for column in PieceTrie._fields},
    "pieces_weights": np.float32,
}
_RAGGED = {
    "segment_offsets": "segment_ids",
    "target_offsets": "target_bytes",
    "control_offsets": "control_bytes",
}
TEXTS = ("strategy", "target_name", "control_name", "target_fingerprint", "control_fingerprint")
NAMES = ("target_special", "control_special")
NO_TABLE = "name a file that `trimtab map build` wrote"
"""The advice for a file that is no table: nothing may be written over it."""
_MARK = f'"format":"{FORMAT}"'.encode()
_LENGTH = 8  # bytes of a safetensors file that say how long its header is
_HEADER = (2**16, 10**8)
"""Bytes of a file in which the mark is looked for, at least and at most."""


class TableError(ValueError):
    """A mapping table that can't be used; the message says which, why, and what to do."""


def refusal(path: Path | None, fault: str, advice: str) -> TableError:
    """An error that names the table, says what is wrong with it and what to do."""
    return TableError(f"mapping table{f' {path}' if path else ''}: {fault}; {advice}")


def rebuild_advice(path: Path | None, texts: Mapping[str, str] | None = None) -> str:
    """The command that builds a table again, with what `texts`, a table's metadata, says of it."""
    texts = texts or {}
    strategy = f" --strategy {shlex.quote(texts['strategy'])}" if "strategy" in texts else ""
    sides = [shlex.quote(texts.get(f"{side}_name", side.upper())) for side in ("target", "control")]
    output = shlex.quote(str(path or "FILE"))
    command = f"trimtab map build --target {sides[0]} --control {sides[1]}{strategy} --output {output}"
    return f"make it anew: {command}"


def is_marked(path: Path) -> bool:
    """Whether a file says in its header that it is a mapping table; it may be damaged all the same."""
    try:
        with path.open("rb") as file:
            declared = int.from_bytes(file.read(_LENGTH), "little")
            return _MARK in file.read(min(max(declared, _HEADER[0]), _HEADER[1]))
    except OSError:
        return False


def check_replaceable(path: Path) -> None:
    """Make sure that nothing is lost if a table is written to `path`.

    Raises:
        TableError: a file with other contents, or something that is no file, is there.
    """
    is_file = path.is_file()
    if path.exists() and not (is_file and (path.stat().st_size == 0 or is_marked(path))):
        kind = "a file that is no mapping table" if is_file else "no file"
        raise TableError(f"{path} is {kind}, and is not replaced; name another file")


def check_is_file(path: Path) -> None:
    """Make sure that a file can be at `path`.

    Raises:
        TableError: there is none.
    """
    if not path.exists():
        raise refusal(path, "there is no such file", rebuild_advice(path))
    if not path.is_file():
        raise refusal(path, "is a directory" if path.is_dir() else "is no regular file", NO_TABLE)


def unreadable(path: Path, error: Exception) -> TableError:
    """The refusal of a file that can't be read as a safetensors file, or without a table's arrays."""
    fault = f"can't be read as a safetensors file with a table's arrays: {error}"
    return refusal(path, fault, rebuild_advice(path) if is_marked(path) else NO_TABLE)


def check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Check the kind, the version and the completeness of a table's metadata.

    Raises:
        TableError: it is another kind of file, of another version, or incomplete.
    """
    if metadata.get("format") != FORMAT or "version" not in metadata:
        fault = f"is not a mapping table: expected metadata with format {FORMAT!r}, found {sorted(metadata)}"
        raise refusal(path, fault, NO_TABLE)
    version = metadata["version"]
    if version != str(VERSION):
        newer = version.isdecimal() and int(version) > VERSION
        advice = " (upgrade trimtab to read it)" if newer else ""
        fault = f"has format version {version!r}, expected {str(VERSION)!r}{advice}"
        texts = {key: metadata[key] for key in TEXTS if key in metadata}
        raise refusal(path, fault, rebuild_advice(path, texts))
    if missing := [key for key in (*TEXTS, *NAMES, "sha256") if key not in metadata]:
        fault = f"is corrupted: its metadata lacks {', '.join(missing)}"
        raise refusal(path, fault, rebuild_advice(path))


def checksum(tensors: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> str:
    """The sha256, in hex, of everything in a table."""
    digest = hashlib.sha256(json.dumps([texts[key] for key in (*TEXTS, *NAMES)]).encode())
    for key in TENSORS:
        digest.update(tensors[key].tobytes())
    return digest.hexdigest()


def encoded_names(names: Mapping[int, str]) -> str:
    """The names of special tokens as they are in the metadata."""
    return json.dumps({**names})


def decoded_names(text: str, rows: int) -> dict[int, str] | None:
    """The names of special tokens by their ids; None if `text` is anything else."""
    try:
        names = {int(token_id): name for token_id, name in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        return None
    fits = all(0 <= token_id < rows and isinstance(name, str) for token_id, name in names.items())
    return names if fits else None


def checksum_fault(found: str, expected: str) -> str | None:
    """The fault of a file in which something changed since it was written; None if nothing did."""
    if found == expected:
        return None
    return f"is corrupted, checksum error: its contents have sha256 {found[:16]}, expected {expected[:16]}"


def structure_fault(tensors: Mapping[str, NDArray[Any]]) -> str | None:
    """What is wrong with the types, the shapes or the indices of a table's arrays; None if nothing is."""
    for key, dtype in TENSORS.items():
        tensor = tensors[key]
        if tensor.dtype != dtype or tensor.ndim != 1:
            return f"{key} is {tensor.dtype} {tensor.shape}, expected one row of {np.dtype(dtype)}"
    rows = len(tensors["mapping"])
    for key, expected in (("exact", rows), ("segment_offsets", rows + 1), ("target_offsets", rows + 1)):
        if len(tensors[key]) != expected:
            return f"{key} has {len(tensors[key])} entries, expected {expected} for {rows} rows of mapping"
    for key, values in _RAGGED.items():
        offsets = tensors[key]
        if (
            not len(offsets)
            or offsets[0]
            or offsets[-1] != len(tensors[values])
            or (offsets[1:] < offsets[:-1]).any()
        ):
            return f"{key} do not partition {values}"
    control_size = len(tensors["control_offsets"]) - 1
    for key, lowest in (("mapping", -1), ("segment_ids", 0)):
        ids = tensors[key]
        if len(ids) and not lowest <= ids.min() <= ids.max() < control_size:
            return f"{key} has ids from {ids.min()} to {ids.max()}, expected {lowest} to {control_size - 1}"
    trie = Trie(*(tensors[f"trie_{column}"] for column in Trie._fields))
    pieces = PieceTrie(*(tensors[f"pieces_{column}"] for column in PieceTrie._fields))
    lengths = np.diff(tensors["segment_offsets"])
    return trie_fault(trie, lengths) or pieces_fault(pieces, rows, control_size)
