"""Path routing: what a control spells in pieces reaches target tokens that are whole.

The target is read as a model over control tokens: each of its tokens has a spelling in them, and the control
acts at the nodes of the trie of these spellings as it would act on a model of its own vocabulary.
docs/path_routing.md derives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab_mappings.trie import ROOT
from trimtab_processors.routing.base import Lookahead
from trimtab_processors.routing.pm_mined import PmMinedRouting
from trimtab_processors.routing.shift import scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trimtab_processors.routing.base import Pair
    from trimtab_processors.routing.pieces import Continuations, PendingSpelling, PieceShifts


class NodeShifts(NamedTuple):
    """The shifts of the target tokens that pass the node of each request.

    A request's tokens are padded with its last one, which has the same values.
    """

    tokens: Tensor
    """int64 [requests, widest]."""
    values: Tensor
    """float32 [requests, widest]."""
    real: Tensor
    """bool [requests, widest]: false for padding, and for all tokens of a request without a node."""


class SpellingTrie:
    """The trie of a mapping table, where the logits live: the n nodes nearest to the root."""

    def __init__(self, pair: Pair) -> None:
        """Prepare the nodes whose spelling is at most `pair.longest` long and whose tokens have logits."""
        table, trie = pair.table, pair.table.trie
        without_logit = np.append(0, np.cumsum(trie.tokens >= pair.width))  # of tokens[:i], how many
        fits = (trie.depths <= pair.longest) & (without_logit[trie.starts] == without_logit[trie.ends])
        used = np.flatnonzero((trie.parents == ROOT) & fits)

        def placed(values: NDArray[np.integer[Any]]) -> Tensor:
            return torch.from_numpy(values).to(pair.device, torch.int64)

        starts = table.segment_offsets[trie.tokens[trie.starts[used]]].astype(np.int64)
        depths = trie.depths[used].astype(np.int64)
        self.longest = int(depths.max(initial=0))
        """The length of the longest spelling of a node, in control tokens."""
        within = np.minimum(np.arange(self.longest), depths[:, None] - 1)
        self.spellings = placed(table.segment_ids[starts[:, None] + within])
        """int64 [n, longest]: the control tokens that lead to each node, padded with its last one."""
        self.depths = placed(depths)
        """int64 [n]: the lengths of the spellings."""
        counts = trie.ends[used] - trie.starts[used]
        self._starts, self._counts = placed(trie.starts[used]), placed(counts)
        self._widest, self._waits = int(counts.max(initial=0)), pair.waits
        self._children = placed(trie.children[used])
        self._tokens = placed(trie.tokens)
        self._segment_offsets, self._segment_ids = placed(table.segment_offsets), placed(table.segment_ids)
        self._control_tokens = len(table.control_offsets) - 1

    def best(self, rows: Tensor) -> Lookahead:
        """Choose the node that each row, float32 [requests, control vocabulary], finds most likely."""
        scores, nodes = rows.index_select(1, self.spellings[:, 0]).max(dim=1)
        lengths = torch.where(scores.isfinite(), self.depths[nodes], 0)
        return Lookahead(nodes, self.spellings[nodes], lengths)

    def at(self, lookahead: Lookahead, rows: Tensor) -> NodeShifts:
        """Return what the tokens that pass the nodes get there.

        Args:
            lookahead: the nodes.
            rows: float32 [requests, control vocabulary], the control's logits at the end of their spellings.
        """
        nodes = lookahead.nodes
        counts = self._counts[nodes][:, None]
        within = torch.arange(int(counts.max()) if self._waits else self._widest, device=nodes.device)
        tokens = self._tokens[self._starts[nodes][:, None] + torch.minimum(within, counts - 1)]
        places = self._segment_offsets[tokens] + self.depths[nodes][:, None]
        ends = places == self._segment_offsets[tokens + 1]
        following = self._segment_ids[places.clamp(max=len(self._segment_ids) - 1)]
        # a token that ends at the node takes the column behind the control's own
        columns = torch.where(ends, rows.shape[1], following)
        others = torch.cat((rows, rows.new_zeros(len(rows), 1)), dim=1).scatter(1, columns, -torch.inf)
        count = min(self._control_tokens, rows.shape[1])  # a model may have fewer logits
        ending = others[:, :count].logsumexp(dim=1) - (count - self._children[nodes]).log()
        values = torch.cat((rows, ending[:, None]), dim=1).gather(1, columns)
        has_node = lookahead.lengths[:, None] > 0
        return NodeShifts(tokens, torch.where(has_node, values, 0.0), (within < counts) & has_node)


class PathRouting:
    """The shift of a target token is the sum of the control's along its spelling in control tokens.

    All tokens get the shift of the first token of their spelling; those without one, that of PM-MinED. Each
    token that passes the *expanded* node of the trie of spellings gets besides the shift with which its
    spelling continues there, and all of them together stay as likely as they were: a node decides between its
    tokens. One that ends there gets the log-mean-exp of the shifts with which none continues.

    One node is expanded for each request: the one that the control finds most likely. That is the control's
    choice alone, so that its rows need not wait for the target's logits.
    """

    def __init__(self, pair: Pair, pieces: PieceShifts | None = None) -> None:
        """Prepare the trie.

        Args:
            pair: the control and the target.
            pieces: the trie of the control's tokens that the target lacks; None: their pieces are target
                tokens like all others.
        """
        table, trie = pair.table, pair.table.trie
        first = table.mapping.copy()
        first[trie.tokens] = table.segment_ids[table.segment_offsets[trie.tokens]]
        self.first = PmMinedRouting(first, pair.width, neutral=pair.neutral, device=pair.device)
        """Gives each token the shift of the first token of its spelling."""
        self._trie, self._pieces = SpellingTrie(pair), pieces
        self.longest = self._trie.longest
        self.children: Mapping[tuple[int, int], int] = pieces.children if pieces else {}

    def lookahead(self, rows: Tensor) -> Lookahead | None:
        return self._trie.best(rows) if self.longest else None

    def shift(
        self,
        rows: Tensor,
        strengths: Tensor,
        lookahead: Lookahead | None,
        ahead: Tensor | None,
        pending: Sequence[PendingSpelling] = (),
    ) -> PathShift:
        at_node = None
        if lookahead is not None and ahead is not None:
            at_node = self._trie.at(lookahead, ahead * strengths[:, None])
        values, finite = scaled(self.first.routed(rows), strengths)
        waiting = None
        if self._pieces is not None:
            finite = finite & self._pieces.shift_first_pieces(values, rows, strengths)
            waiting = self._pieces.continuations(pending, strengths) if pending else None
        return PathShift(values, finite, at_node, waiting)


class PathShift:
    """The shift of first tokens, and what expanded nodes make of it."""

    def __init__(
        self,
        values: Tensor,
        finite: Tensor,
        at_node: NodeShifts | None,
        waiting: Continuations | None = None,
    ) -> None:
        """Put a shift together.

        Args:
            values: float32 [requests, target vocabulary], the shift of first tokens, scaled; changed by this.
            finite: bool [requests], false if that is not finite.
            at_node: what the tokens at each request's node get.
            waiting: what pending requests get.
        """
        if at_node is not None:
            finite = finite & at_node.values.isfinite().all(dim=1)
        if waiting is not None:
            odd = torch.zeros_like(waiting.ending).index_add_(0, waiting.owners, waiting.values)
            finite = finite.index_fill(0, waiting.places[~(odd + waiting.ending).isfinite()], value=False)
        self.finite = finite
        self._values = values.masked_fill_(~finite[:, None], 0.0)
        self._at_node, self._waiting = at_node, waiting
        if at_node is not None:
            self._real = at_node.real & finite[:, None]
            self._before = values.gather(1, at_node.tokens)
        self._ended = None if waiting is None else values[waiting.places]

    def resolve(self, logits: Tensor, index: Tensor) -> Tensor:
        if self._waiting is not None and self._ended is not None:
            self._values[self._waiting.places] = self._ended
        if self._at_node is not None:
            self._decide(self._at_node, logits, index)
        if self._waiting is not None:
            self._shift_pending(self._waiting, logits, index)
        return self._values

    def _decide(self, at_node: NodeShifts, logits: Tensor, index: Tensor) -> None:
        """Write the shifts of the tokens that pass the nodes."""
        # first pieces have shifts of their own, which count for what a node's tokens are likely without it
        own = logits[index[:, None], at_node.tokens].float() + self._before
        own = own.masked_fill(~self._real, -torch.inf)
        grown = (own + at_node.values).logsumexp(dim=1) - own.logsumexp(dim=1)
        # a grammar that masks all tokens of a node leaves nothing to decide there
        added = at_node.values - torch.where(grown.isfinite(), grown, 0.0)[:, None]
        added = torch.where(self._real.any(dim=1, keepdim=True), added, 0.0)
        self._values.scatter_(1, at_node.tokens, self._before + added)

    def _shift_pending(self, waiting: Continuations, logits: Tensor, index: Tensor) -> None:
        """Shift the tokens that continue pending spellings, and all others together against them.

        Those others keep the shifts that they have, and together the probability that the control's end of
        the spelling gives them.
        """
        own = logits[index[waiting.places]].float()
        own[waiting.owners, waiting.tokens] = -torch.inf
        shifts = self._values[waiting.places]
        grown = (own + shifts).logsumexp(dim=1) - own.logsumexp(dim=1)
        grown = torch.where(grown.isfinite(), grown, 0.0)  # a grammar masks all others
        shifts += (waiting.ending - grown)[:, None]
        shifts[waiting.owners, waiting.tokens] = waiting.values
        self._values[waiting.places] = torch.where(self.finite[waiting.places, None], shifts, 0.0)


def make(pair: Pair) -> PathRouting:
    """Make the routing of a pair."""
    return PathRouting(pair)
