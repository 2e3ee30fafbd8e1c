"""Mapping tables: what is in them, kept in a file, and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import shlex
import uuid
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab_mappings.trie import Trie, trie_fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trimtab_mappings.vocabulary import Vocabulary

FORMAT = "trimtab-mapping"
VERSION = 3
_TENSORS = {
    "mapping": np.int32,
    "exact": np.bool_,
    "segment_offsets": np.int32,
    "segment_ids": np.int32,
    "target_offsets": np.int32,
    "target_bytes": np.uint8,
    "control_offsets": np.int32,
    "control_bytes": np.uint8,
    **{f"trie_{column}": np.int32 for column in Trie._fields},
}
_RAGGED = {
    "segment_offsets": "segment_ids",
    "target_offsets": "target_bytes",
    "control_offsets": "control_bytes",
}
_TEXTS = ("strategy", "target_name", "control_name", "target_fingerprint", "control_fingerprint")
_NAMES = ("target_special", "control_special")


class TableError(ValueError):
    """A mapping table that can't be used; the message says which, why, and what to run."""


class Kind(IntEnum):
    """Why a target token receives the shift that it receives."""

    NONE = 0
    """It receives no token's shift: nothing fits."""
    EXACT = 1
    """The control token has the same bytes."""
    PREFIX = 2
    """The control token is a proper prefix of it."""
    EXTENSION = 3
    """It is a proper prefix of the control token."""
    ROLE = 4
    """Both are special tokens of one role."""


class Coverage(NamedTuple):
    """How many target tokens are mapped, by kind; see `Kind`."""

    exact: int
    prefix: int
    extension: int
    role: int
    none: int


@dataclass(frozen=True, eq=False)
class MappingTable:
    """Which control token's shift each target token receives, and how the control spells that token.

    The bytes of both vocabularies are in it, so that a table can be inspected without their tokenizers.
    """

    mapping: NDArray[np.int32]
    """[V_target]: control ids; -1 where nothing fits."""
    exact: NDArray[np.bool_]
    """[V_target]: the two tokens are text and have the same bytes."""
    segment_offsets: NDArray[np.int32]
    """[V_target + 1]: where each token's segment starts in `segment_ids`, and where the last ends."""
    segment_ids: NDArray[np.int32]
    """[sum of lengths]: control ids; token t is `segment_ids[segment_offsets[t]:segment_offsets[t + 1]]`."""
    target_offsets: NDArray[np.int32]
    """[V_target + 1]: where each target token starts in `target_bytes`, and where the last ends."""
    target_bytes: NDArray[np.uint8]
    """[sum of lengths]: the target's tokens; special tokens and unused ids are empty."""
    control_offsets: NDArray[np.int32]
    """[V_control + 1]: where each control token starts in `control_bytes`, and where the last ends."""
    control_bytes: NDArray[np.uint8]
    """[sum of lengths]: the control's tokens; special tokens and unused ids are empty."""
    trie: Trie
    """Where the segments of the target's tokens part."""
    strategy: str
    """How tokens that the control does not have were mapped: a key of `STRATEGIES`."""
    target_name: str
    control_name: str
    target_fingerprint: str
    control_fingerprint: str
    target_special: Mapping[int, str]
    """The names of the target's special tokens by their ids."""
    control_special: Mapping[int, str]
    """The names of the control's special tokens by their ids."""
    source: Path | None = None
    """The file it was loaded from."""

    def segment(self, token_id: int) -> NDArray[np.int32]:
        """One target token's bytes in control tokens."""
        return self.segment_ids[self.segment_offsets[token_id] : self.segment_offsets[token_id + 1]]

    @cached_property
    def target_tokens(self) -> list[bytes]:
        """The bytes of each target token by id."""
        return _split(self.target_bytes, self.target_offsets)

    @cached_property
    def control_tokens(self) -> list[bytes]:
        """The bytes of each control token by id."""
        return _split(self.control_bytes, self.control_offsets)

    @cached_property
    def kinds(self) -> NDArray[np.uint8]:
        """uint8 [V_target]: the `Kind` of each row."""
        lengths = np.diff(self.target_offsets)
        shorter = np.append(np.diff(self.control_offsets), 0)[self.mapping] < lengths  # -1 has no length
        text = np.where(shorter, Kind.PREFIX, Kind.EXTENSION)
        text[self.exact] = Kind.EXACT
        mapped = np.where(lengths > 0, text, Kind.ROLE)
        return np.where(self.mapping >= 0, mapped, Kind.NONE).astype(np.uint8)

    @property
    def coverage(self) -> Coverage:
        """How many target tokens are of which kind."""
        return self.weighted_coverage(np.ones(len(self.mapping), np.int64))

    def weighted_coverage(self, uses: NDArray[np.int64]) -> Coverage:
        """How many of `uses`, int64 [V_target], are of tokens of which kind."""
        return Coverage(*(int(uses[self.kinds == Kind[kind.upper()]].sum()) for kind in Coverage._fields))

    def save(self, path: Path) -> None:
        """Write the table to `path`, which is replaced in one step: no reader ever sees half a file.

        Raises:
            OSError: the file can't be written; what was there before stays.
        """
        from safetensors.numpy import save  # noqa: PLC0415 - only where it is used

        path.parent.mkdir(parents=True, exist_ok=True)
        trie = {f"trie_{column}": values for column, values in self.trie._asdict().items()}
        tensors = trie | {key: getattr(self, key) for key in _TENSORS if key not in trie}
        texts = {key: getattr(self, key) for key in _TEXTS}
        texts |= {key: _encoded_names(getattr(self, key)) for key in _NAMES}
        checksum = _checksum(tensors, texts)
        metadata = {"format": FORMAT, "version": str(VERSION), **texts, "sha256": checksum}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(save(tensors, metadata))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> MappingTable:
        """Read a table.

        Raises:
            TableError: there is no such file, it is truncated, corrupted, not a table, or of another version.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only where it is used

        if not path.is_file():
            raise _refusal(path, "is a directory" if path.is_dir() else "there is no such file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                _check_metadata(path, metadata)
                tensors = {key: file.get_tensor(key) for key in _TENSORS}
        except TableError:
            raise
        except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
            raise _refusal(  # numpy knows not every type that a header can name
                path, f"can't be read as a safetensors file with a table's arrays: {error}"
            ) from error
        texts = {key: metadata[key] for key in (*_TEXTS, *_NAMES)}
        if fault := _fault(tensors) or _difference(_checksum(tensors, texts), metadata["sha256"]):
            raise _refusal(path, fault, texts)
        trie = Trie(*(tensors.pop(f"trie_{column}") for column in Trie._fields))
        fields: dict[str, Any] = {**tensors, **texts, "trie": trie}
        for key, rows in zip(_NAMES, ("target_offsets", "control_offsets"), strict=True):
            fields[key] = _special_names(texts[key], len(tensors[rows]) - 1)
            if fields[key] is None:
                raise _refusal(path, f"{key} is no JSON object of token ids and names", texts)
        return cls(**fields, source=path)

    def check(self, target: Vocabulary, control: Vocabulary | None = None) -> None:
        """Make sure that this table is for these vocabularies; without `control`, for this target.

        Raises:
            TableError: a fingerprint differs.
        """
        if faults := "; ".join(self._mismatches(target=target, control=control)):
            names = {
                "target_name": target.name,
                "control_name": control.name if control else self.control_name,
                "strategy": self.strategy,
            }
            raise _refusal(self.source, faults, names)

    def _mismatches(self, **sides: Vocabulary | None) -> Iterator[str]:
        for side, here in sides.items():
            name, fingerprint = getattr(self, f"{side}_name"), getattr(self, f"{side}_fingerprint")
            if here and fingerprint != here.fingerprint:
                yield (
                    f"its {side} is {name!r} ({fingerprint[:16]}), but the {side} here is"
                    f" {here.name!r} ({here.fingerprint[:16]})"
                )


def _split(values: NDArray[np.uint8], offsets: NDArray[np.int32]) -> list[bytes]:
    data, bounds = values.tobytes(), offsets.tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


def _refusal(path: Path | None, fault: str, texts: Mapping[str, str] | None = None) -> TableError:
    texts = texts or {}
    table = f"mapping table {path}" if path else "mapping table"
    strategy = f" --strategy {shlex.quote(texts['strategy'])}" if "strategy" in texts else ""
    sides = [shlex.quote(texts.get(f"{side}_name", side.upper())) for side in ("target", "control")]
    output = shlex.quote(str(path or "FILE"))
    command = f"trimtab map build --target {sides[0]} --control {sides[1]}{strategy} --output {output}"
    return TableError(f"{table}: {fault}; make it anew: {command}")


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT or "version" not in metadata:
        fault = f"is not a mapping table: expected metadata with format {FORMAT!r}, found {sorted(metadata)}"
        raise _refusal(path, fault)
    version = metadata["version"]
    if version != str(VERSION):
        newer = version.isdecimal() and int(version) > VERSION
        advice = " (upgrade trimtab to read it)" if newer else ""
        fault = f"has format version {version!r}, expected {str(VERSION)!r}{advice}"
        raise _refusal(path, fault, {key: metadata[key] for key in _TEXTS if key in metadata})
    if missing := [key for key in (*_TEXTS, *_NAMES, "sha256") if key not in metadata]:
        raise _refusal(path, f"is corrupted: its metadata lacks {', '.join(missing)}")


def _checksum(tensors: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([texts[key] for key in (*_TEXTS, *_NAMES)]).encode())
    for key in _TENSORS:
        digest.update(tensors[key].tobytes())
    return digest.hexdigest()


def _encoded_names(names: Mapping[int, str]) -> str:
    return json.dumps({**names})


def _special_names(text: str, rows: int) -> dict[int, str] | None:
    """The names of special tokens by their ids; none where they are anything else."""
    try:
        names = {int(token_id): name for token_id, name in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        return None
    fits = all(0 <= token_id < rows and isinstance(name, str) for token_id, name in names.items())
    return names if fits else None


def _difference(found: str, expected: str) -> str | None:
    if found == expected:
        return None
    return f"is corrupted: its contents have sha256 {found[:16]}, expected {expected[:16]}"


def _fault(tensors: dict[str, NDArray[Any]]) -> str | None:
    for key, dtype in _TENSORS.items():
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
    return trie_fault(trie, np.diff(tensors["segment_offsets"]))
