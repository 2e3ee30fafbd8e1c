"""What is in a mapping table: how much of it is exact, what its worst rows are, where one token goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trimtab_mappings.pm_mined import distance
from trimtab_mappings.table import Coverage, Kind, MappingTable, TableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from trimtab_mappings.encoder import ByteEncoder

COARSE_USES = 0.05
COARSE_TOKENS = 0.5
"""A control with a larger share of its uses, or without a text of its tokens, in pieces is coarser than
its target; docs/mappings.md has what was measured."""

_HEXADECIMAL = re.compile(r"<([0-9A-F]{2}(?: [0-9A-F]{2})*)>")


@dataclass(frozen=True)
class Token:
    """One token of a vocabulary."""

    id: int
    bytes: bytes
    """b"" for a special token."""
    name: str | None = None
    """The name of a special token."""


@dataclass(frozen=True)
class Row:
    """One row of a table: a target token and the control token whose shift it receives."""

    target: Token
    kind: Kind
    control: Token | None
    distance: int
    """The edit distance of the two; of a text without a counterpart, its own length. In characters, or in
    bytes where either is not valid UTF-8."""
    uses: int | None = None
    """How often the target token occurs in the text that the table is weighed by."""


@dataclass(frozen=True)
class Neighbour:
    """A control token that begins as a target token does, or the other way round."""

    token: Token
    kind: Kind
    distance: int


@dataclass(frozen=True)
class Lookup:
    """All about one row."""

    row: Row
    segment: list[Token]
    """The target token's bytes, tokenized by the control."""
    near: list[Neighbour]
    """The nearest control tokens, the nearest first."""


class Uses(NamedTuple):
    """How often each token occurs in a text, which each side has tokenized itself."""

    target: NDArray[np.int64]
    """[V_target]."""
    control: NDArray[np.int64]
    """[V_control]."""


class Part(NamedTuple):
    """So many of so many."""

    part: int
    whole: int


@dataclass(frozen=True)
class Pieces:
    """The tokens of one vocabulary that are none of the other, which has to spell them in pieces if it can.

    Special tokens are left out.
    """

    tokens: Part
    uses: Part | None
    """The tokens of the text; none without a text."""


@dataclass(frozen=True)
class Summary:
    """A table at a glance."""

    target_name: str
    control_name: str
    strategy: str
    target_fingerprint: str
    control_fingerprint: str
    target_tokens: int
    control_tokens: int
    coarser: bool
    """Whether so much of the control is in pieces that the mapping may not carry what it does."""
    control_in_pieces: Pieces
    """What the target must choose piece by piece, while the control knows only the whole."""
    target_in_pieces: Pieces
    """What the control would say piece by piece, of which a row names one."""
    from_bare_space: Pieces
    """The target's tokens without a counterpart that the control spells from a bare space on: words of other
    scripts, which no routing carries."""
    coverage: Coverage
    """Rows by kind."""
    uses: Coverage | None
    """Tokens of the text by the kind of their row; none without a text."""
    distances: dict[int, int]
    """How many rows of the kinds prefix and extension have which distance."""
    distance_uses: dict[int, int] | None
    """The same, weighed by the text."""
    worst: list[Row]
    """Rows by distance, or by distance times uses where there is a text; the worst first."""


@dataclass(frozen=True)
class Change:
    """A row that is not the same in two tables."""

    before: Row
    after: Row


@dataclass(frozen=True)
class Difference:
    """How two tables of one target differ."""

    rows: int
    kinds: dict[str, int]
    """How many of the changed rows went from which kind to which: `prefix to exact`."""
    changes: list[Change]
    """By token id."""
    segments: int
    """How many tokens the two controls spell differently."""


def count_tokens(
    table: MappingTable, target: ByteEncoder, control: ByteEncoder, texts: Sequence[str]
) -> Uses:
    """Count how often each token of either side occurs in `texts`.

    Raises:
        TableError: `target` or `control` is not the table's.
    """
    table.check(target.vocabulary, control.vocabulary)
    return Uses(_counts(target, texts), _counts(control, texts))


def summarize(table: MappingTable, text_uses: Uses | None = None, *, worst: int = 20) -> Summary:
    """Describe a table.

    Args:
        table: the table.
        text_uses: how often each token occurs; see `count_tokens`.
        worst: how many of the worst rows to name.
    """
    uses, control_uses = text_uses or (None, None)
    control_in_pieces = _in_pieces(table.control_tokens, table.target_tokens, control_uses)
    distances = _distances(table)
    approximate = np.isin(table.kinds, (Kind.PREFIX, Kind.EXTENSION))
    cost = distances if uses is None else distances * uses
    order = np.argsort(-cost, kind="stable")[:worst]
    return Summary(
        target_name=table.target_name,
        control_name=table.control_name,
        strategy=table.strategy,
        target_fingerprint=table.target_fingerprint,
        control_fingerprint=table.control_fingerprint,
        target_tokens=len(table.mapping),
        control_tokens=len(table.control_offsets) - 1,
        coarser=_is_coarse(control_in_pieces),
        control_in_pieces=control_in_pieces,
        target_in_pieces=_in_pieces(table.target_tokens, table.control_tokens, uses),
        from_bare_space=_pieces(table.from_bare_space, table.target_tokens, uses),
        coverage=table.coverage,
        uses=None if uses is None else table.weighted_coverage(uses),
        distances=_histogram(distances[approximate]),
        distance_uses=None if uses is None else _histogram(distances[approximate], uses[approximate]),
        worst=[_row(table, i, uses) for i in order.tolist() if cost[i] > 0],
    )


def look_up(table: MappingTable, token: str, *, near: int = 10) -> list[Lookup]:
    """Everything about the rows of one target token.

    Args:
        table: the table.
        token: `#` and an id; or the token's text, or its name where it is special; or its bytes as `<E4 B8>`.
        near: how many of the nearest control tokens to name.

    Returns:
        One for each target token that has these bytes or this name.

    Raises:
        KeyError: the target has no such token.
    """
    return [
        Lookup(
            row=_row(table, token_id),
            segment=[_control(table, i) for i in table.segment(token_id).tolist()],
            near=_neighbours(table, table.target_tokens[token_id])[:near],
        )
        for token_id in _find(table, token)
    ]


def compare(before: MappingTable, after: MappingTable) -> Difference:
    """Compare two tables of one target, row by row; control tokens by their bytes.

    Raises:
        TableError: they are not of one target.
    """
    if before.target_fingerprint != after.target_fingerprint:
        first, second = (
            f"{table.source or 'a table'} is for {table.target_name!r} ({table.target_fingerprint[:16]})"
            for table in (before, after)
        )
        raise TableError(f"only tables of one target can be compared: {first}, {second}")
    same_control = before.control_fingerprint == after.control_fingerprint
    rows = len(before.mapping)
    changes = [
        Change(old, new)
        for old, new in ((_row(before, i), _row(after, i)) for i in range(rows))
        if (old.kind, _identity(old, same_control)) != (new.kind, _identity(new, same_control))
    ]
    kinds = [f"{change.before.kind.name} to {change.after.kind.name}".lower() for change in changes]
    return Difference(
        rows=rows,
        kinds={kind: kinds.count(kind) for kind in sorted({*kinds})},
        changes=changes,
        segments=sum(_spelling(before, i) != _spelling(after, i) for i in range(rows)),
    )


def _counts(encoder: ByteEncoder, texts: Iterable[str]) -> NDArray[np.int64]:
    """int64 [V]: how often each of the encoder's tokens occurs."""
    ids = [np.array(encoder.encode(text.encode())[0], dtype=np.int64) for text in texts]
    return np.bincount(np.concatenate([*ids, np.empty(0, np.int64)]), minlength=len(encoder.vocabulary))


def _in_pieces(own: Sequence[bytes], others: Sequence[bytes], uses: NDArray[np.int64] | None) -> Pieces:
    """The tokens of `own` that are none of `others`; uses: int [own]."""
    known = {*others}
    return _pieces(np.array([token not in known for token in own], dtype=np.bool_), own, uses)


def _pieces(chosen: NDArray[np.bool_], own: Sequence[bytes], uses: NDArray[np.int64] | None) -> Pieces:
    """How many tokens of text are chosen; chosen: bool [own], uses: int [own]."""
    text = np.array([token != b"" for token in own], dtype=np.bool_)
    part = chosen & text
    return Pieces(
        tokens=Part(int(part.sum()), int(text.sum())),
        uses=None if uses is None else Part(int(uses[part].sum()), int(uses[text].sum())),
    )


def _is_coarse(control: Pieces) -> bool:
    pieces, most = (control.uses, COARSE_USES) if control.uses else (control.tokens, COARSE_TOKENS)
    return pieces.part > most * pieces.whole


def _row(table: MappingTable, token_id: int, uses: NDArray[np.int64] | None = None) -> Row:
    target, control_id = table.target_tokens[token_id], int(table.mapping[token_id])
    control = _control(table, control_id) if control_id >= 0 else None
    return Row(
        target=Token(token_id, target, table.target_special.get(token_id)),
        kind=Kind(int(table.kinds[token_id])),
        control=control,
        distance=distance(target, control.bytes if control else b""),
        uses=None if uses is None else int(uses[token_id]),
    )


def _control(table: MappingTable, control_id: int) -> Token:
    return Token(control_id, table.control_tokens[control_id], table.control_special.get(control_id))


def _distances(table: MappingTable) -> NDArray[np.int64]:
    """int64 [V_target]: as in `Row`."""
    controls = [*table.control_tokens, b""]  # what -1 stands for
    pairs = zip(table.target_tokens, table.mapping.tolist(), table.exact.tolist(), strict=True)
    return np.array([0 if exact else distance(target, controls[i]) for target, i, exact in pairs])


def _histogram(values: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> dict[int, int]:
    counts = np.bincount(values, weights).astype(np.int64)
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def _find(table: MappingTable, token: str) -> Sequence[int]:
    if token[:1] == "#" and token[1:].isdecimal():
        if (token_id := int(token[1:])) < len(table.mapping):
            return [token_id]
        raise KeyError(f"no token {token}: {table.target_name} has {len(table.mapping)} tokens, from #0 on")
    wanted = {_bytes(token)}
    if match := _HEXADECIMAL.fullmatch(token):
        wanted.add(bytes.fromhex(match[1]))
    found = [i for i, own in enumerate(table.target_tokens) if own and own in wanted]
    found += [i for i, name in table.target_special.items() if name == token]
    if not found:
        others = [other for other in (f" {token}", token.strip()) if _bytes(other) in table.target_tokens]
        suggestion = " or ".join(map(repr, filter(None, others)))
        hint = (
            f"did you mean {suggestion}?" if suggestion else "name a token by its text, as #ID or as <E4 B8>"
        )
        raise KeyError(f"no token {token!r} among the {len(table.mapping)} of {table.target_name}; {hint}")
    return found


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _neighbours(table: MappingTable, target: bytes) -> list[Neighbour]:
    found = [
        Neighbour(Token(i, own), _kind(target, own), distance(target, own))
        for i, own in enumerate(table.control_tokens)
        if own and target and (target.startswith(own) or own.startswith(target))
    ]
    return sorted(found, key=lambda neighbour: (neighbour.distance, neighbour.token.id))


def _kind(target: bytes, control: bytes) -> Kind:
    if target == control:
        return Kind.EXACT
    return Kind.PREFIX if len(control) < len(target) else Kind.EXTENSION


def _identity(row: Row, same_control: bool) -> int | bytes | str | None:
    if row.control is None:
        return None
    return row.control.id if same_control else row.control.bytes or str(row.control.name)


def _spelling(table: MappingTable, token_id: int) -> list[bytes]:
    return [table.control_tokens[i] for i in table.segment(token_id).tolist()]
