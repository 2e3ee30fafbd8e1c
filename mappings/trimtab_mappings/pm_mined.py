"""PM-MinED: prefix match with minimal edit distance.

A target token that the control does not have maps to the control token at the least edit distance among those
that are a prefix of it or that it is a prefix of. Between such strings the edit distance is the difference of
their lengths, so that no distances need to be computed and no pairs to be scanned.

Source: Wu et al., "Cross-model Control: Improving Multiple Large Language Models in One-time Training",
NeurIPS 2024, arXiv 2410.17599.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_SPACE = b" "


def nearest(tokens: Collection[bytes], control: Mapping[bytes, int]) -> dict[bytes, int]:
    """Find the control token that is nearest to each of `tokens`, none of which the control has.

    The distance is counted in characters, or in bytes where either side is not valid UTF-8. At the same
    distance the lowest id wins. A bare space stands for nothing that has anything but spaces in it.

    Args:
        tokens: the bytes of target tokens, none of them empty.
        control: the control's token ids by their bytes, none of them empty.

    Returns:
        Control ids by the bytes of those target tokens that have a neighbour.
    """
    wanted = {*tokens}
    best: dict[bytes, tuple[int, int]] = {}
    for token, candidate in chain(_prefixes(wanted, control), _extensions(wanted, control)):
        found = (distance(token, candidate), control[candidate])
        best[token] = min(best.get(token, found), found)
    return {token: token_id for token, (_, token_id) in best.items()}


def distance(one: bytes, other: bytes) -> int:
    """The edit distance of two strings of which one is a prefix of the other, in characters or bytes."""
    try:
        return abs(len(one.decode()) - len(other.decode()))
    except UnicodeDecodeError:
        return abs(len(one) - len(other))


def _prefixes(wanted: Collection[bytes], control: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of a wanted token and a control token that is a proper prefix of it.

    Of a token's prefixes those are left out that are shorter than one of whole characters: they are farther.
    """
    for token in wanted:
        for end in range(len(token) - 1, 0, -1):
            prefix = token[:end]
            if prefix in control and (prefix != _SPACE or not token.strip(_SPACE)):
                yield token, prefix
                if _is_text(prefix):
                    break


def _extensions(wanted: Collection[bytes], control: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of a wanted token and a control token that it is a proper prefix of."""
    for candidate in control:
        for end in range(1, len(candidate)):
            if (token := candidate[:end]) in wanted:
                yield token, candidate


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
