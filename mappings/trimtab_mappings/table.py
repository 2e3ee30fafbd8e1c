"""Mapping tables: what is in them, kept in a file, and checked before they are used."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab_mappings.pieces import PieceTrie
from trimtab_mappings.table_file import (
    FORMAT,
    NAMES,
    TENSORS,
    TEXTS,
    VERSION,
    TableError,
    check_is_file,
    check_metadata,
    checksum,
    checksum_fault,
    decoded_names,
    encoded_names,
    rebuild_advice,
    refusal,
    structure_fault,
    unreadable,
)
from trimtab_mappings.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trimtab_mappings.vocabulary import Vocabulary


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
    """Both are special tokens of one role, or of one name."""


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
    pieces: PieceTrie
    """The control tokens that the target does not have, spelled in target tokens."""
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

    @cached_property
    def from_bare_space(self) -> NDArray[np.bool_]:
        """[V_target]: the token has no counterpart, and the control spells it from a bare space on.

        Such tokens are words of a script that the control spells in characters or bytes.
        """
        is_space = np.array([token == b" " for token in self.control_tokens], dtype=np.bool_)
        spelled = np.diff(self.segment_offsets) > 0
        first = self.segment_ids[self.segment_offsets[:-1][spelled]]
        found = np.zeros(len(self.mapping), np.bool_)
        found[spelled] = is_space[first]
        return found & (self.mapping < 0)

    @property
    def coverage(self) -> Coverage:
        """How many target tokens are of which kind."""
        return self.weighted_coverage(np.ones(len(self.mapping), np.int64))

    @property
    def longest_target_token(self) -> int:
        """Upper bound on the bytes that a target token stands for; special tokens count as their names."""
        special = max((len(text.encode()) for text in self.target_special.values()), default=0)
        return max(special, int(np.diff(self.target_offsets).max(initial=0)))

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
        tries = {f"trie_{column}": values for column, values in self.trie._asdict().items()}
        tries |= {f"pieces_{column}": values for column, values in self.pieces._asdict().items()}
        tensors = tries | {key: getattr(self, key) for key in TENSORS if key not in tries}
        texts = {key: getattr(self, key) for key in TEXTS}
        texts |= {key: encoded_names(getattr(self, key)) for key in NAMES}
        metadata = {"format": FORMAT, "version": str(VERSION), **texts, "sha256": checksum(tensors, texts)}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(save(tensors, metadata))
            temporary.replace(path)
        except OSError as error:  # which names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> MappingTable:
        """Read a table.

        Raises:
            TableError: there is no such file, it is truncated, corrupted, not a table, or of another version.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only where it is used

        check_is_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                check_metadata(path, metadata)
                tensors = {key: file.get_tensor(key) for key in TENSORS}
        except TableError:
            raise
        # numpy knows not every type that a header can name
        except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error
        texts = {key: metadata[key] for key in (*TEXTS, *NAMES)}
        changed = checksum_fault(checksum(tensors, texts), metadata["sha256"])
        if fault := changed or structure_fault(tensors):
            raise refusal(path, fault, rebuild_advice(path, texts))
        trie = Trie(*(tensors.pop(f"trie_{column}") for column in Trie._fields))
        pieces = PieceTrie(*(tensors.pop(f"pieces_{column}") for column in PieceTrie._fields))
        fields: dict[str, Any] = {**tensors, **texts, "trie": trie, "pieces": pieces}
        for key, rows in zip(NAMES, ("target_offsets", "control_offsets"), strict=True):
            fields[key] = decoded_names(texts[key], len(tensors[rows]) - 1)
            if fields[key] is None:
                fault = f"{key} is no JSON object of token ids and names"
                raise refusal(path, fault, rebuild_advice(path, texts))
        return cls(**fields, source=path)

    def check(self, target: Vocabulary, control: Vocabulary | None = None) -> None:
        """Make sure that this table is for these vocabularies; without `control`, for this target.

        Raises:
            TableError: a fingerprint differs.
        """
        faults = "; ".join(self._mismatches(target=target, control=control))
        if faults and control and self._is_swapped(target, control):
            fault = f"the target and the control are swapped: {faults}"
            raise refusal(self.source, fault, "name them the other way round")
        if faults:
            names = {
                "target_name": target.name,
                "control_name": control.name if control else self.control_name,
                "strategy": self.strategy,
            }
            raise refusal(self.source, faults, rebuild_advice(self.source, names))

    def _is_swapped(self, target: Vocabulary, control: Vocabulary) -> bool:
        own = (self.target_fingerprint, self.control_fingerprint)
        return own == (control.fingerprint, target.fingerprint)

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


__all__ = ["Coverage", "Kind", "MappingTable", "TableError"]
