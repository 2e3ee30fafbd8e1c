"""Mapping tables: made from two vocabularies, kept in a file, checked before they are used."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trimtab_mappings.pm_mined import match

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from trimtab_mappings.encoder import ByteEncoder
    from trimtab_mappings.vocabulary import Vocabulary

FORMAT = "trimtab-mapping"
VERSION = "1"
_TENSORS = {"mapping": np.int32, "exact": np.bool_, "segment_offsets": np.int32, "segment_ids": np.int32}
_TEXTS = ("target_fingerprint", "control_fingerprint", "target_name", "control_name")

_log = logging.getLogger(__name__)


class TableError(ValueError):
    """A mapping table that can't be used; the message says which, why, and what to run."""


class Coverage(NamedTuple):
    """How many target tokens have a control token of the same bytes, another one, or none."""

    exact: int
    approximate: int
    none: int


@dataclass(frozen=True, eq=False)
class MappingTable:
    """Which control token's shift each target token receives, and how the control spells that token."""

    mapping: NDArray[np.int32]
    """[V_target]: control ids; -1 where nothing fits."""
    exact: NDArray[np.bool_]
    """[V_target]: the two tokens are text and have the same bytes."""
    segment_offsets: NDArray[np.int32]
    """[V_target + 1]: where each token's segment starts in `segment_ids`, and where the last ends."""
    segment_ids: NDArray[np.int32]
    """[sum of lengths]: control ids; token t is `segment_ids[segment_offsets[t]:segment_offsets[t + 1]]`."""
    target_fingerprint: str
    control_fingerprint: str
    target_name: str
    control_name: str
    source: Path | None = None
    """The file it was loaded from."""

    def segment(self, token_id: int) -> NDArray[np.int32]:
        """One target token's bytes in control tokens."""
        return self.segment_ids[self.segment_offsets[token_id] : self.segment_offsets[token_id + 1]]

    @property
    def coverage(self) -> Coverage:
        mapped, exact = int((self.mapping >= 0).sum()), int(self.exact.sum())
        return Coverage(exact, mapped - exact, len(self.mapping) - mapped)

    def save(self, path: Path) -> None:
        """Write the table to `path`, which is replaced in one step: no reader ever sees half a file."""
        from safetensors.numpy import save  # noqa: PLC0415 - only where it is used

        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "version": VERSION} | {key: getattr(self, key) for key in _TEXTS}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(save({key: getattr(self, key) for key in _TENSORS}, metadata))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> MappingTable:
        """Read a table.

        Raises:
            TableError: there is no such file, it is truncated, not a table, or of another version.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only where it is used

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                _check_metadata(path, metadata)
                tensors = {key: file.get_tensor(key) for key in _TENSORS}
        except (OSError, SafetensorError) as error:
            raise _refusal(path, f"can't be read: {error}") from error
        if fault := _fault(tensors):
            raise _refusal(path, fault)
        return cls(**tensors, **{key: metadata[key] for key in _TEXTS}, source=path)

    def check(self, target: Vocabulary, control: Vocabulary) -> None:
        """Make sure that this table is for these two vocabularies.

        Raises:
            TableError: a fingerprint differs.
        """
        sides = (
            ("target", self.target_name, self.target_fingerprint, target),
            ("control", self.control_name, self.control_fingerprint, control),
        )
        differing = [
            f"its {side} is {name!r} ({fingerprint[:16]}), but the {side} here is"
            f" {vocabulary.name!r} ({vocabulary.fingerprint[:16]})"
            for side, name, fingerprint, vocabulary in sides
            if fingerprint != vocabulary.fingerprint
        ]
        if differing:
            raise _refusal(self.source, "; ".join(differing), target.name, control.name)


def build_table(target: Vocabulary, control: ByteEncoder) -> MappingTable:
    """Map `target`'s tokens to `control`'s: text by PM-MinED, special tokens by role."""
    own = control.vocabulary
    mapping, exact = match(target.tokens, own.tokens, target.byte_fallback, own.byte_fallback)
    for target_id, control_id in _by_role(target, own):
        mapping[target_id] = control_id
    segments = control.encode_all(target.tokens)
    for token_id in (*np.flatnonzero(exact).tolist(), *target.special):
        segments[token_id] = [int(mapping[token_id])] if mapping[token_id] >= 0 else []
    return MappingTable(
        mapping=mapping,
        exact=exact,
        segment_offsets=np.cumsum([0, *map(len, segments)], dtype=np.int32),
        segment_ids=np.array([i for segment in segments for i in segment], dtype=np.int32),
        target_fingerprint=target.fingerprint,
        control_fingerprint=own.fingerprint,
        target_name=target.name,
        control_name=own.name,
    )


def cached_table(target: Vocabulary, control: ByteEncoder, directory: Path) -> MappingTable:
    """Load the table for these two from `directory`; build and save it if it is missing or refused."""
    name = f"{target.fingerprint[:16]}-{control.vocabulary.fingerprint[:16]}.safetensors"
    path = directory / name
    if path.exists():
        try:
            table = MappingTable.load(path)
            table.check(target, control.vocabulary)
        except TableError as error:
            _log.warning("building the mapping table anew: %s", error)
        else:
            return table
    table = build_table(target, control)
    table.save(path)
    return table


def _by_role(target: Vocabulary, control: Vocabulary) -> Iterator[tuple[int, int]]:
    # where one token has several roles, the last one stands: what a model generates it for
    for role in ("pad", "unk", "bos", "end_of_turn", "eos"):
        counterparts = control.roles.get("eos" if role == "end_of_turn" else role, ())
        for target_id in target.roles.get(role, ()):
            yield target_id, counterparts[0] if counterparts else -1


def _refusal(path: Path | None, fault: str, target: str = "TARGET", control: str = "CONTROL") -> TableError:
    table = f"mapping table {path}" if path else "mapping table"
    command = f"trimtab map build --target {target} --control {control} --output {path or 'FILE'}"
    return TableError(f"{table}: {fault}; make it anew: {command}")


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT or not metadata.keys() >= {"version", *_TEXTS}:
        raise _refusal(path, "is not a mapping table: its metadata is of another kind")
    if (version := metadata["version"]) != VERSION:
        fault = f"has version {version!r}, this program reads version {VERSION!r}"
        raise _refusal(path, fault, metadata["target_name"], metadata["control_name"])


def _fault(tensors: dict[str, NDArray[np.generic]]) -> str | None:
    for key, dtype in _TENSORS.items():
        tensor = tensors[key]
        if tensor.dtype != dtype or tensor.ndim != 1:
            return f"{key} is {tensor.dtype} {tensor.shape}, expected one row of {np.dtype(dtype)}"
    rows, exact_rows, offsets = len(tensors["mapping"]), len(tensors["exact"]), tensors["segment_offsets"]
    if exact_rows != rows or len(offsets) != rows + 1:
        return f"mapping has {rows} rows, exact {exact_rows}, segment_offsets {len(offsets)}"
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(tensors["segment_ids"]) or ends != sorted(ends):
        return "segment_offsets do not partition segment_ids"
    return None
