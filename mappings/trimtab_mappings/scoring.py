"""How well a table predicts a control's own tokens, on text.

Where a token of the target and one of the control begin at the same place of a text, the control's own next
token is known: the one with which it goes on there. A table is right at that place if it routes the target's
token to it. The share of such places is the table's accuracy, weighted by how often tokens occur.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab_mappings.table import Coverage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from trimtab_mappings.encoder import ByteEncoder
    from trimtab_mappings.table import MappingTable

# what a text is cut into where a vocabulary can't spell all of it: lines, then words
_PARTS = (re.compile(r"[^\n]+"), re.compile(r" ?\S+"))


@dataclass(frozen=True)
class Meetings:
    """The places of a text where a token of the target and one of the control begin."""

    target_ids: NDArray[np.int64]
    """[places]: the target's tokens that begin there."""
    control_ids: NDArray[np.int64]
    """[places]: the control's."""
    target_tokens: int
    """All tokens of the target in the text."""
    control_tokens: int
    """All tokens of the control in the text."""
    skipped_bytes: int
    """The part of the text that one of the two vocabularies can't spell."""


@dataclass(frozen=True)
class Score:
    """How a table does on a text."""

    strategy: str
    places: int
    """Where boundaries of target and control meet."""
    hits: int
    """Where the table names the control's own token."""
    accuracy: float
    """hits / places; 0 without places."""
    places_by_kind: Coverage
    hits_by_kind: Coverage


def find_meetings(target: ByteEncoder, control: ByteEncoder, texts: Iterable[str]) -> Meetings:
    """Tokenize `texts` by both, without special tokens and dummy prefixes, and find where boundaries meet."""
    counts = np.zeros(3, dtype=np.int64)  # the target's tokens, the control's, bytes left out
    found: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
    for text in texts:
        counts[2] += len(text.encode())
        for target_ids, control_ids, size in _spelled(target, control, text, _PARTS):
            counts += (len(target_ids), len(control_ids), -size)
            _, at_target, at_control = np.intersect1d(
                _starts(target, target_ids), _starts(control, control_ids), return_indices=True
            )
            pairs = (np.array(target_ids, np.int64)[at_target], np.array(control_ids, np.int64)[at_control])
            found.append(np.stack(pairs))
    target_at, control_at = np.concatenate(found, axis=1)
    return Meetings(target_at, control_at, *map(int, counts))


def score(table: MappingTable, meetings: Meetings) -> Score:
    """Score a table by the places that `find_meetings` found for its target and control."""
    hits = table.mapping[meetings.target_ids] == meetings.control_ids
    rows = len(table.mapping)
    places = len(hits)
    return Score(
        strategy=table.strategy,
        places=places,
        hits=int(hits.sum()),
        accuracy=float(hits.mean()) if places else 0.0,
        places_by_kind=table.weighted_coverage(np.bincount(meetings.target_ids, minlength=rows)),
        hits_by_kind=table.weighted_coverage(np.bincount(meetings.target_ids[hits], minlength=rows)),
    )


def _spelled(
    target: ByteEncoder, control: ByteEncoder, text: str, parts: Sequence[re.Pattern[str]]
) -> Iterator[tuple[list[int], list[int], int]]:
    """The target's tokens, the control's, and the bytes of each part of `text` that both can spell."""
    data = text.encode()
    target_ids, control_ids = (encoder.encode(data)[0] for encoder in (target, control))
    if target.join(target_ids) == control.join(control_ids) == data:
        yield target_ids, control_ids, len(data)
    elif parts:
        for part in parts[0].findall(text):
            yield from _spelled(target, control, part, parts[1:])


def _starts(encoder: ByteEncoder, ids: Sequence[int]) -> NDArray[np.int64]:
    """int64 [tokens]: the place of the first byte of each token."""
    lengths = [len(encoder.vocabulary.tokens[i]) for i in ids]
    return np.cumsum([0, *lengths])[:-1]
