"""The trie of a target's tokens, each spelled in control tokens, as flat arrays.

Its nodes are what path routing expands: partial spellings at which several target tokens part. Where all that
pass go the same way, or end, nothing is decided, and there is no node.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

ROOT = -1


class Trie(NamedTuple):
    """The spellings in order: the tokens that pass a node stand side by side, those that end at it first."""

    tokens: NDArray[np.int32]
    """[tokens in the trie]: target ids in the order of their spellings."""
    starts: NDArray[np.int32]
    """[nodes]: where in `tokens` those that pass the node begin."""
    ends: NDArray[np.int32]
    """[nodes]: where they end."""
    depths: NDArray[np.int32]
    """[nodes]: the length of the partial spelling, at least 1."""
    parents: NDArray[np.int32]
    """[nodes]: the nearest node above, `ROOT` where there is none; a parent stands before its children."""
    children: NDArray[np.int32]
    """[nodes]: with how many different control tokens the spellings go on, at least 1."""


def build_trie(spellings: Mapping[int, Sequence[int]]) -> Trie:
    """Arrange target tokens by their spellings, none of them empty."""
    ordered = sorted((tuple(spelling), token) for token, spelling in spellings.items())
    nodes = [*_nodes([spelling for spelling, _ in ordered])]
    columns = zip(*nodes, strict=True) if nodes else [()] * 5
    return Trie(
        np.array([token for _, token in ordered], dtype=np.int32),
        *(np.array(column, dtype=np.int32) for column in columns),
    )


def _nodes(spellings: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """The columns of `Trie` behind its first, node by node."""
    count = 0
    waiting = [(0, len(spellings), 0, ROOT)]
    while waiting:
        start, end, depth, parent = waiting.pop()
        inner = start
        while inner < end and len(spellings[inner]) == depth:
            inner += 1
        branches = [*_branches(spellings, inner, end, depth)]
        if depth and branches and len(branches) + (inner > start) > 1:
            yield start, end, depth, parent, len(branches)
            parent, count = count, count + 1
        waiting += [(*branch, depth + 1, parent) for branch in branches if branch[1] - branch[0] > 1]


def _branches(
    spellings: Sequence[Sequence[int]], start: int, end: int, depth: int
) -> Iterator[tuple[int, int]]:
    """Where those of spellings[start:end] that go on with the same token begin and end."""
    for _, members in groupby(range(start, end), key=lambda place: spellings[place][depth]):
        first, *rest = members
        yield first, first + len(rest) + 1


def trie_fault(trie: Trie, lengths: NDArray[np.int64]) -> str | None:
    """What is wrong with a trie that was read from a file.

    Args:
        trie: what was read.
        lengths: int64 [V_target], of how many control tokens each target token's spelling is.

    Returns:
        None where nothing is: every index that routing follows stays within its array.
    """
    tokens, nodes = trie.tokens, len(trie.starts)
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < len(lengths) and lengths[tokens].all()):
        return "trie_tokens names tokens without a spelling"
    if any(len(column) != nodes for column in trie[1:]):
        return "the columns of the trie's nodes are of different lengths"
    inside = (trie.starts >= 0) & (trie.starts < trie.ends) & (trie.ends <= len(tokens))
    above = (trie.parents >= ROOT) & (trie.parents < np.arange(nodes))
    counted = (trie.children > 0) & (trie.children <= trie.ends - trie.starts)
    if not (inside & above & counted).all():
        return "the trie's nodes are not nodes of its tokens"
    if not (trie.depths > np.append(trie.depths, 0)[trie.parents]).all():
        return "the trie's nodes are not deeper than those above them"
    if (lengths[tokens[trie.starts]] < trie.depths).any():
        return "the trie's nodes are deeper than the spellings that pass them"
    return None
