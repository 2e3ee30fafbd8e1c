"""PM-MinED: prefix match with minimal edit distance.

A target token that the control has maps to itself; any other to the control token at the least edit distance
among those that are a prefix of it or that it is a prefix of. Between such strings the edit distance is the
difference of their lengths, so that no distances need to be computed and no pairs to be scanned.

Source: Wu et al., "Cross-model Control: Improving Multiple Large Language Models in One-time Training",
NeurIPS 2024, arXiv 2410.17599.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trimtab_mappings.vocabulary import index_tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

_SPACE = b" "


def match(
    target: Sequence[bytes],
    control: Sequence[bytes],
    target_fallback: Collection[int] = (),
    control_fallback: Collection[int] = (),
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Find the control token of each target token; empty tokens have none and are none.

    The distance is counted in characters, or in bytes where either side is not valid UTF-8. At the same
    distance the first control token in id order wins; of tokens with the same bytes one of text wins.

    Args:
        target: the bytes of each target token by id.
        control: the bytes of each control token by id.
        target_fallback: ids of the target's byte tokens, which match the control's byte tokens first.
        control_fallback: ids of the control's byte tokens.

    Returns:
        mapping: int32 [V_target], control ids, -1 where nothing fits.
        exact: bool [V_target], whether the two tokens have the same bytes.
    """
    index = index_tokens(control, control_fallback)
    nearest = _nearest({token for token in target if token and token not in index}, index)
    mapping = np.array([index.get(token, nearest.get(token, -1)) for token in target], dtype=np.int32)
    exact = np.array([token in index for token in target], dtype=np.bool_)
    byte_ids = {control[i]: i for i in sorted(control_fallback, reverse=True)}
    for token_id in target_fallback:
        mapping[token_id] = byte_ids.get(target[token_id], mapping[token_id])
    return mapping, exact


def _nearest(wanted: Collection[bytes], index: Mapping[bytes, int]) -> dict[bytes, int]:
    characters = {token: _count_characters(token) for token in (*wanted, *index)}
    best: dict[bytes, tuple[int, int]] = {}

    def consider(token: bytes, candidate: bytes) -> None:
        if candidate == _SPACE and token.strip(_SPACE):
            return
        own, other = characters[token], characters[candidate]
        if own is None or other is None:
            own, other = len(token), len(candidate)
        found = (abs(own - other), index[candidate])
        best[token] = min(best.get(token, found), found)

    for token in wanted:
        for candidate in _proper_prefixes(token):
            if candidate in index:
                consider(token, candidate)
    for candidate in index:
        for token in _proper_prefixes(candidate):
            if token in wanted:
                consider(token, candidate)
    return {token: token_id for token, (_, token_id) in best.items()}


def _proper_prefixes(token: bytes) -> Iterable[bytes]:
    return (token[:end] for end in range(1, len(token)))


def _count_characters(token: bytes) -> int | None:
    try:
        return len(token.decode())
    except UnicodeDecodeError:
        return None
