"""The trie of a control's tokens, each spelled in target tokens, as flat arrays.

It holds the control tokens that the target lacks: those that are coarser than the target's. Every partial
spelling of one is a node. What the control says of a node's target token is what it says of all its own
tokens below, in proportion to how likely they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trimtab_mappings.trie import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from trimtab_mappings.encoder import ByteEncoder

LEAF = ROOT - 1
"""In `PieceTrie.children`: a spelling ends here, and no longer one begins with it."""
_FLATNESS = 50
"""Added to a token's rank, so that the first tokens have similar weights."""


class PieceTrie(NamedTuple):
    """The spellings in order: the control tokens below a node stand side by side, its own first."""

    entries: NDArray[np.int32]
    """[entries]: control ids."""
    weights: NDArray[np.float32]
    """[entries]: how likely each is, in proportion."""
    tokens: NDArray[np.int32]
    """[nodes]: the target token that leads to the node from the one above."""
    parents: NDArray[np.int32]
    """[nodes]: the node above, `ROOT` where there is none; a parent stands before its children."""
    starts: NDArray[np.int32]
    """[nodes]: where in `entries` those below the node begin, with the node's own."""
    ends: NDArray[np.int32]
    """[nodes]: where they end."""
    owned: NDArray[np.int32]
    """[nodes]: 1 where the first of them is the node's own: the control token, or the first of several, with
    which the control says the node's bytes and no more; 0 where it can't say them."""

    def children(self) -> dict[tuple[int, int], int]:
        """The node that follows on a node, or `ROOT`, by a target token; `LEAF` for all that end."""
        inner = {*self.parents.tolist()}
        steps = enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))
        return {step: node if node in inner else LEAF for node, step in steps}


def build_pieces(target: ByteEncoder, control: ByteEncoder) -> PieceTrie:
    """Spell the control's tokens that the target lacks, each as the target's tokenizer does by itself."""
    own = control.vocabulary.ids
    coarse = [token for token in own if token not in target.vocabulary.ids]
    spellings = {
        tuple(spelling)
        for token, spelling in zip(coarse, target.encode_all(coarse), strict=True)
        if len(spelling) > 1 and target.join(spelling) == token
    }
    paths = [*_paths(spellings)]
    texts = {path: target.join(path) for path in paths}
    missing = [*dict.fromkeys(text for text in texts.values() if text not in own)]
    pieces = dict(zip(missing, control.encode_all(missing), strict=True))
    said = {
        path: [own[text]] if text in own else pieces[text] if control.join(pieces[text]) == text else []
        for path, text in texts.items()
    }
    tokens = enumerate(control.vocabulary.tokens)
    return _arranged(paths, said, _ranks(token_id for token_id, token in tokens if token))


def _paths(spellings: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Every beginning of the spellings, once, in order."""
    before: tuple[int, ...] = ()
    for spelling in sorted(spellings):
        for length in range(1, len(spelling) + 1):
            if spelling[:length] != before[:length]:
                yield spelling[:length]
        before = spelling


def _ranks(ids: Iterable[int]) -> dict[int, int]:
    """The places of token ids in their order: trainers give the likelier tokens the lower ids."""
    return {token_id: rank for rank, token_id in enumerate(sorted(ids))}


def _arranged(
    paths: Sequence[tuple[int, ...]],
    said: Mapping[tuple[int, ...], Sequence[int]],
    ranks: Mapping[int, int],
) -> PieceTrie:
    nodes = {path: node for node, path in enumerate(paths)}
    entries = [said[path][0] for path in paths if said[path]]
    weights = [1 / (max(ranks[i] for i in said[path]) + _FLATNESS) for path in paths if said[path]]
    starts = np.cumsum([0, *(bool(said[path]) for path in paths)], dtype=np.int32)
    last = list(range(len(paths)))
    for path in reversed(paths):
        if len(path) > 1:
            above = nodes[path[:-1]]
            last[above] = max(last[above], last[nodes[path]])
    return PieceTrie(
        entries=np.array(entries, dtype=np.int32),
        weights=np.array(weights, dtype=np.float32),
        tokens=np.array([path[-1] for path in paths], dtype=np.int32),
        parents=np.array([nodes.get(path[:-1], ROOT) for path in paths], dtype=np.int32),
        starts=starts[:-1],
        ends=starts[1:][np.array(last, dtype=np.int64)] if paths else starts[:0],
        owned=np.array([bool(said[path]) for path in paths], dtype=np.int32),
    )


def pieces_fault(trie: PieceTrie, target_size: int, control_size: int) -> str | None:
    """Return the fault of a trie that was read from a file; None if it has none.

    Args:
        trie: what was read.
        target_size: the number of target tokens.
        control_size: the number of control tokens.
    """
    nodes, entries = len(trie.tokens), len(trie.entries)
    if len(trie.weights) != entries or any(len(column) != nodes for column in trie[2:]):
        return "the columns of the pieces are of different lengths"
    for name, ids, size in (("entries", trie.entries, control_size), ("tokens", trie.tokens, target_size)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            return f"pieces_{name} has ids from {ids.min()} to {ids.max()}, expected 0 to {size - 1}"
    if not (np.isfinite(trie.weights) & (trie.weights > 0)).all():
        return "pieces_weights are not all positive numbers"
    inside = (trie.starts >= 0) & (trie.starts < trie.ends) & (trie.ends <= entries)
    above = (trie.parents >= ROOT) & (trie.parents < np.arange(nodes))
    if not (inside & above & np.isin(trie.owned, (0, 1))).all():
        return "the nodes of the pieces are not nodes of their control tokens"
    return None
