"""From two vocabularies to a mapping table."""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from trimtab_mappings.pieces import build_pieces
from trimtab_mappings.special_tokens import counterparts
from trimtab_mappings.strategies import DEFAULT, STRATEGIES
from trimtab_mappings.table import MappingTable, TableError
from trimtab_mappings.trie import build_trie
from trimtab_mappings.vocabulary import role_warning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trimtab_mappings.encoder import ByteEncoder
    from trimtab_mappings.vocabulary import Vocabulary

_log = logging.getLogger(__name__)


def build_table(target: ByteEncoder, control: ByteEncoder, strategy: str = DEFAULT) -> MappingTable:
    """Map `target`'s tokens to `control`'s.

    Tokens that the control has are mapped to themselves, special tokens by their role or name, byte tokens to
    byte tokens, and all others as `strategy` says.

    Raises:
        ValueError: there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"no strategy {strategy!r}, there are: {', '.join(STRATEGIES)}")
    theirs, own = target.vocabulary, control.vocabulary
    index = own.ids
    missing = list(dict.fromkeys(token for token in theirs.tokens if token and token not in index))
    segments = dict(zip(missing, control.encode_all(missing), strict=True))
    by_bytes = {**STRATEGIES[strategy](segments, own), **index}
    mapping = [by_bytes.get(token, -1) for token in theirs.tokens]
    for token_id, control_id in chain(_byte_tokens(theirs, own), counterparts(theirs, own).items()):
        mapping[token_id] = control_id
    exact = [token in index for token in theirs.tokens]
    pieces = [
        segments[token] if token in segments else [control_id] * (control_id >= 0)
        for token, control_id in zip(theirs.tokens, mapping, strict=True)
    ]
    spellings = {
        token_id: pieces[token_id]
        for token_id, token in enumerate(theirs.tokens)
        if _has_path(token, mapping[token_id], pieces[token_id], own)
    }
    return MappingTable(
        mapping=np.array(mapping, dtype=np.int32),
        exact=np.array(exact, dtype=np.bool_),
        segment_offsets=_offsets(pieces),
        segment_ids=np.fromiter(chain.from_iterable(pieces), dtype=np.int32),
        target_offsets=_offsets(theirs.tokens),
        target_bytes=np.frombuffer(b"".join(theirs.tokens), dtype=np.uint8),
        control_offsets=_offsets(own.tokens),
        control_bytes=np.frombuffer(b"".join(own.tokens), dtype=np.uint8),
        trie=build_trie(spellings),
        pieces=build_pieces(target, control),
        strategy=strategy,
        target_name=theirs.name,
        control_name=own.name,
        target_fingerprint=theirs.fingerprint,
        control_fingerprint=own.fingerprint,
        target_special=theirs.names,
        control_special=own.names,
    )


def cached_table(
    target: ByteEncoder, control: ByteEncoder, directory: Path, strategy: str = DEFAULT
) -> MappingTable:
    """Load the table for these two from `directory`; build and save it if it is missing or refused."""
    served = target.vocabulary
    names = (served.fingerprint[:16], control.vocabulary.fingerprint[:16], strategy)
    path = directory / f"{'-'.join(names)}.safetensors"
    if path.exists():
        try:
            table = MappingTable.load(path)
            table.check(served, control.vocabulary)
        except TableError as error:
            _log.warning("building the mapping table anew: %s", error)
        else:
            return table
    for side, vocabulary in (("target", served), ("control", control.vocabulary)):
        if warning := role_warning(vocabulary, side):
            _log.warning("%s", warning)
    table = build_table(target, control, strategy)
    try:
        table.save(path)
    except OSError as error:
        _log.warning("the mapping table can't be kept, it will be built at every start: %s", error)
    return table


def _has_path(token: bytes, mapped: int, segment: Sequence[int], control: Vocabulary) -> bool:
    """Whether a target token's shift can be found by going along its segment: not where it is special, or
    unmapped, or stands for the beginning of a control token, or begins with a bare space, which says nothing
    of a word.
    """
    if mapped < 0 or not token or not segment or not control.special.isdisjoint(segment):
        return False
    begins_something = len(control.tokens[mapped]) > len(token)
    first = control.tokens[segment[0]]
    return not begins_something and (len(segment) == 1 or first != b" " or not token.strip(b" "))


def _byte_tokens(target: Vocabulary, control: Vocabulary) -> Iterator[tuple[int, int]]:
    """Pairs of byte tokens: where both have a byte twice, as text and as a byte, each goes to its like."""
    counterparts = {control.tokens[i]: i for i in control.byte_fallback}
    for token_id in target.byte_fallback:
        if (counterpart := counterparts.get(target.tokens[token_id])) is not None:
            yield token_id, counterpart


def _offsets(items: Iterable[bytes | Sequence[int]]) -> NDArray[np.int32]:
    """int32 [items + 1]: where each item starts when all are joined, and where the last ends."""
    return np.cumsum([0, *map(len, items)], dtype=np.int32)
