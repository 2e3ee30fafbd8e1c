"""What a control says of target tokens that are pieces of its own: the other half of path routing.

A control token that the target lacks is spelled in target tokens. The first piece of it gets the control's
shift of all its tokens below that piece, in proportion to how likely they are; and while a spelling is
pending, what goes on with it is read off the row before it. docs/path_routing.md derives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab_mappings.trie import ROOT
from trimtab_processors.routing.path import PathRouting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trimtab_processors.routing.base import Pair


class PendingSpelling(NamedTuple):
    """A request whose last tokens begin some of the control's, and may go on with them."""

    place: int
    """Where its row is among those of the step."""
    node: int
    """The node of `PieceTrie` that its last tokens lead to."""
    row: Tensor
    """float32 [control vocabulary]: what the control said before them."""


class Continuations(NamedTuple):
    """What p pending requests get: m tokens that go on with a spelling, and all others together."""

    places: Tensor
    """int64 [p]: where their rows are among those of the step."""
    owners: Tensor
    """int64 [m]: of which of them each token is."""
    tokens: Tensor
    """int64 [m]."""
    values: Tensor
    """float32 [m]."""
    ending: Tensor
    """float32 [p]: what the others get for ending the spelling where it is."""


class PieceShifts:
    """The trie of a mapping table's pieces, where the logits live: n nodes, above m entries."""

    def __init__(self, pair: Pair) -> None:
        """Prepare the trie of a pair. Control tokens without a logit count for nothing."""
        trie, width, device = pair.table.pieces, pair.width, pair.device
        has_logit = trie.entries < (len(pair.table.control_offsets) if pair.logits is None else pair.logits)
        weights = np.where(has_logit, np.log(trie.weights), -np.inf).astype(np.float32)
        fits = trie.tokens < width
        first = (trie.parents == ROOT) & fits
        owners = np.repeat(np.arange(int(first.sum())), (trie.ends - trie.starts)[first])
        ranges = [np.arange(s, e) for s, e in zip(trie.starts[first], trie.ends[first], strict=True)]
        below = np.concatenate([*ranges, np.empty(0, np.int64)]).astype(np.int64)

        def placed(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, torch.int64)

        self.children: Mapping[tuple[int, int], int] = trie.children()
        """The node that follows on a node by a target token, see `PieceTrie.children`."""
        self._log_weights = torch.from_numpy(weights).to(device)
        self._entries = placed(np.where(has_logit, trie.entries, 0))
        self._firsts, self._first_owners = placed(trie.tokens[first]), placed(owners)
        self._first_entries = self._entries[placed(below)]
        self._first_weights = self._log_weights[placed(below)]
        """float32 [m]: the logarithms of the weights of the entries below first pieces, which add up to 1."""
        sums = _log_sums(self._first_weights[None], self._first_owners[None], len(self._firsts))[0]
        self._first_weights = self._first_weights - sums[self._first_owners]
        self._starts, self._ends = placed(trie.starts), placed(trie.ends)
        self._owned, self._tokens = placed(trie.owned), placed(trie.tokens)
        children = np.flatnonzero((trie.parents != ROOT) & fits)
        order = children[np.argsort(trie.parents[children], kind="stable")]
        counts = np.bincount(trie.parents[order], minlength=len(trie.tokens))
        self._child_nodes = placed(order)
        self._child_counts = placed(counts)
        self._child_starts = placed(np.cumsum(counts) - counts)

    def shift_first_pieces(self, values: Tensor, rows: Tensor, strengths: Tensor) -> Tensor:
        """Give each first piece the mean shift of all control tokens that begin with it.

        Args:
            values: float32 [requests, target vocabulary], the shift of first tokens, scaled; changed by this.
            rows: float32 [requests, control vocabulary].
            strengths: float32 [requests], the factors on the shifts.

        Returns:
            bool [requests]: whether all that was given is finite.
        """
        if not len(self._firsts):
            return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        shifts = rows.index_select(1, self._first_entries) * strengths[:, None]
        owners = self._first_owners.expand(len(rows), -1)
        means = _log_sums(shifts + self._first_weights, owners, len(self._firsts))
        values[:, self._firsts] = means
        return means.sum(dim=1).isfinite()

    def continuations(self, pending: Sequence[PendingSpelling], strengths: Tensor) -> Continuations:
        """Compute the shifts of the tokens that continue pending spellings, and of those that end them.

        Args:
            pending: at least one.
            strengths: float32 [requests], the factors on the shifts of all requests of the step.
        """
        device = strengths.device
        places = torch.tensor([each.place for each in pending], device=device)
        nodes = torch.tensor([each.node for each in pending], device=device)
        rows = torch.stack([each.row for each in pending]) * strengths[places, None]
        whole = self._means(nodes, torch.arange(len(nodes), device=device), rows)
        owned = self._owned[nodes].bool()
        own = rows.gather(1, self._entries[self._starts[nodes]][:, None])[:, 0]
        owners, within = _spread(self._child_counts[nodes])
        below = self._child_nodes[self._child_starts[nodes][owners] + within]
        values = self._means(below, owners, rows) - whole[owners]
        ending = torch.where(owned, own - whole, 0.0)
        return Continuations(places, owners, self._tokens[below], values, ending)

    def _means(self, nodes: Tensor, owners: Tensor, rows: Tensor) -> Tensor:
        """float32 [nodes]: what all control tokens below each node get in the row of its owner."""
        of_node, within = _spread(self._ends[nodes] - self._starts[nodes])
        entries = self._starts[nodes][of_node] + within
        shifts, weights = rows[owners[of_node], self._entries[entries]], self._log_weights[entries]
        weighted = _log_sums((shifts + weights)[None], of_node[None], len(nodes))[0]
        return weighted - _log_sums(weights[None], of_node[None], len(nodes))[0]


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of `counts`, int64 [n], that many items: whose it is, and which of those; int64 [sum]."""
    owners = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    within = torch.arange(len(owners), device=counts.device) - (counts.cumsum(0) - counts)[owners]
    return owners, within


def _log_sums(terms: Tensor, owners: Tensor, count: int) -> Tensor:
    """The logarithm of the sum of exp(`terms`) of each owner.

    Args:
        terms: float32 [rows, m].
        owners: int64 [rows, m], less than `count`.
        count: the number of owners.

    Returns:
        float32 [rows, count].
    """
    most = terms.new_full((len(terms), count), -torch.inf).scatter_reduce(1, owners, terms, "amax")
    sums = torch.zeros_like(most).scatter_add_(1, owners, (terms - most.gather(1, owners)).exp())
    return sums.log() + most


def make(pair: Pair) -> PathRouting:
    """Make path routing that carries tokens in pieces, too."""
    return PathRouting(pair, PieceShifts(pair))
