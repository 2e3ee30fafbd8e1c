"""Path routing: what a control spells in pieces reaches target tokens that are whole.

The target is read as a model over control tokens: each of its tokens has a spelling in them, and the control
acts at every node of the trie of these spellings as it would act on a model of its own vocabulary.
docs/path_routing.md derives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab_mappings.trie import ROOT
from trimtab_processors.routing import PmMined
from trimtab_processors.shift import scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trimtab_mappings import MappingTable
    from trimtab_processors.pieces import Continuations, PendingSpelling, PieceShifts
    from trimtab_processors.routing import Further

_UNUSED = ROOT - 1


class Expanded(NamedTuple):
    """What m target tokens get at the nodes that they pass; a token may pass several."""

    nodes: Tensor
    """int64 [m]: the place of the node among those that were asked for."""
    tokens: Tensor
    """int64 [m]."""
    values: Tensor
    """float32 [m]."""


class Spellings:
    """The trie of a mapping table, where the logits live: n nodes, which some of m target tokens pass."""

    def __init__(
        self,
        table: MappingTable,
        width: int,
        *,
        longest: int,
        neutral: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the trie.

        Args:
            table: the mapping table.
            width: the columns of the target's logits.
            longest: nodes with a longer partial spelling are not used.
            neutral: as for `PmMined`.
            device: where rows and logits live.
        """
        trie = table.trie
        passing = trie.tokens[trie.starts]
        above = np.append(trie.depths, 0)[trie.parents]  # ROOT, -1, finds the 0
        without_logit = np.append(0, np.cumsum(trie.tokens >= width))  # of tokens[:i], how many
        fits = (trie.depths <= longest) & (without_logit[trie.starts] == without_logit[trie.ends])

        def placed(values: NDArray[np.integer[Any]]) -> Tensor:
            return torch.from_numpy(values).to(device, torch.int64)

        first = table.mapping.copy()
        first[trie.tokens] = table.segment_ids[table.segment_offsets[trie.tokens]]
        self.first = PmMined(first, width, neutral=neutral, device=device)
        """Gives each token the shift of the first token of its spelling."""
        self._table = table
        self.entries = placed(table.segment_ids[table.segment_offsets[passing] + above])
        """int64 [n]: the control token with which the nearest node above goes on to this one."""
        self.parents = placed(np.where(fits, trie.parents, _UNUSED))
        """int64 [n]: the nearest node above, or `ROOT`."""
        self._starts, self._counts = placed(trie.starts), placed(trie.ends - trie.starts)
        self._depths, self._children = placed(trie.depths), placed(trie.children)
        self._tokens = placed(trie.tokens)
        self._segment_offsets, self._segment_ids = placed(table.segment_offsets), placed(table.segment_ids)
        self._control_tokens = len(table.control_offsets) - 1

    def lookahead(self, rounds: int) -> int:
        """The length of the longest partial spelling that is reached in so many rounds."""
        above, reached = self.parents, torch.zeros_like(self.parents, dtype=torch.bool)
        for _ in range(rounds):
            reached |= above == ROOT
            above = torch.where(above >= 0, self.parents[above], above)
        return int(torch.where(reached, self._depths, 0).max()) if len(reached) else 0

    def path(self, node: int) -> list[int]:
        """The partial spelling that ends at a node, in control tokens."""
        trie = self._table.trie
        spelling: list[int] = self._table.segment(trie.tokens[trie.starts[node]]).tolist()
        return spelling[: trie.depths[node]]

    def expand(self, nodes: Tensor, rows: Tensor) -> Expanded:
        """What the tokens that pass some nodes get there.

        Args:
            nodes: int64 [e].
            rows: float32 [e, control vocabulary], what the control says at the end of each one's spelling.
        """
        counts = self._counts[nodes]
        owners = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        within = torch.arange(len(owners), device=nodes.device) - (counts.cumsum(0) - counts)[owners]
        tokens = self._tokens[self._starts[nodes][owners] + within]
        places = self._segment_offsets[tokens] + self._depths[nodes][owners]
        ends = places == self._segment_offsets[tokens + 1]
        going_on = self._segment_ids[places.clamp(max=len(self._segment_ids) - 1)]
        # a token that ends takes the column behind the control's own
        columns = torch.where(ends, rows.shape[1], going_on)
        others = torch.cat((rows, rows.new_zeros(len(rows), 1)), dim=1)
        others[owners, columns] = -torch.inf
        count = min(self._control_tokens, rows.shape[1])  # a model may have fewer logits
        ending = others[:, :count].logsumexp(dim=1) - (count - self._children[nodes]).log()
        values = torch.cat((rows, ending[:, None]), dim=1)[owners, columns]
        return Expanded(owners, tokens, values)


class PathRouting:
    """The shift of a target token is the sum of the control's along its spelling in control tokens.

    All tokens get the shift of the first token of their spelling; those without one, that of PM-MinED. Each
    token that passes an *expanded* node of the trie of spellings gets besides the shift with which its
    spelling goes on there, and all of them together stay as likely as they were: a node decides between its
    tokens. One that ends there gets the log-mean-exp of the shifts with which none goes on.

    What is expanded is the control's choice alone, so that its rows need not wait for the target's logits:
    the nodes with the highest sums of shifts on the way to them.
    """

    def __init__(
        self, spellings: Spellings, beam: int = 1, depth: int = 1, pieces: PieceShifts | None = None
    ) -> None:
        """Expand `beam` nodes in each of `depth` rounds, for every request.

        Args:
            spellings: the trie of the target's tokens.
            beam: how many nodes a round expands.
            depth: how many rounds there are; one may expand what is below the nodes of those before.
            pieces: the trie of the control's tokens that the target lacks; None: their pieces are target
                tokens like all others.
        """
        self.lookahead = spellings.lookahead(depth)
        self.children = pieces.children if pieces else {}
        self._spellings, self._pieces = spellings, pieces
        self.beam, self.depth = beam, depth

    def route(
        self, rows: Tensor, strengths: Tensor, further: Further, pending: Sequence[PendingSpelling] = ()
    ) -> PathShift:
        nodes, expanded = self._spellings, []
        entered = rows.index_select(1, nodes.entries)
        sums = torch.where(nodes.parents == ROOT, entered, -torch.inf)
        for rest in reversed(range(self.depth if self.lookahead else 0)):
            beam = min(self.beam, sums.shape[1])
            best = sums.topk(beam, dim=1)
            for rank in reversed(range(beam)):  # the best last: the next step may go on from it
                places = best.values[:, rank].isfinite().nonzero()[:, 0]
                chosen = best.indices[places, rank]
                if len(places):
                    paths = map(nodes.path, chosen.tolist())
                    more = further([*zip(places.tolist(), paths, strict=True)])
                    expanded.append((places, nodes.expand(chosen, more * strengths[places, None])))
                    if rest:
                        self._reach(sums, places, chosen, more)
        values, finite = scaled(nodes.first.shift(rows), strengths)
        waiting = None
        if self._pieces is not None:
            finite = finite & self._pieces.shift_first_pieces(values, rows, strengths)
            waiting = self._pieces.continuations(pending, strengths) if pending else None
        return PathShift(values, finite, expanded, waiting)

    def _reach(self, sums: Tensor, places: Tensor, chosen: Tensor, rows: Tensor) -> None:
        """Bring `sums`, float32 [requests, n], of what may be expanded from there to what is below the nodes
        `chosen`, int64 [e], with the `rows`, float32 [e, control vocabulary], at them.
        """
        through = sums[places, chosen][:, None] + rows.index_select(1, self._spellings.entries)
        below = self._spellings.parents == chosen[:, None]
        sums[places] = torch.where(below, through, sums[places])
        sums[places, chosen] = -torch.inf


class PathShift:
    """The shift of first tokens, and what expanded nodes make of it."""

    def __init__(
        self,
        values: Tensor,
        finite: Tensor,
        expanded: Sequence[tuple[Tensor, Expanded]],
        waiting: Continuations | None = None,
    ) -> None:
        """Put a shift together.

        Args:
            values: float32 [requests, target vocabulary], the shift of first tokens, scaled; changed by this.
            finite: bool [requests], of which requests that is not finite, and 0.
            expanded: int64 [e], for which requests, and what the tokens at those e nodes get; and so on.
            waiting: what pending requests get.
        """
        empty = torch.empty(0, dtype=torch.int64, device=values.device)
        requests, tokens, nodes, shifts, self._count = [empty], [empty], [empty], [empty.float()], 0
        for places, (owners, of_tokens, of_values) in expanded:
            requests.append(places[owners])
            tokens.append(of_tokens)
            nodes.append(owners + self._count)
            shifts.append(of_values)
            self._count += len(places)
        self._requests, self._tokens, self._nodes = torch.cat(requests), torch.cat(tokens), torch.cat(nodes)
        going_on = torch.cat(shifts)
        broken = torch.zeros(len(values), device=values.device)
        broken.index_add_(0, self._requests, (~going_on.isfinite()).float())
        if waiting is not None:
            odd = torch.zeros_like(waiting.ending).index_add_(0, waiting.owners, waiting.values)
            broken.index_add_(0, waiting.places, (~(odd + waiting.ending).isfinite()).float())
        self.finite = finite & (broken == 0)
        self._going_on = torch.where(self.finite[self._requests], going_on, 0.0)
        values[~self.finite] = 0.0
        self._values = values
        self._places = self._requests * values.shape[1] + self._tokens
        self._before = values.view(-1)[self._places]
        self._waiting = waiting
        self._ended = None if waiting is None else values[waiting.places]

    def over(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        places = torch.tensor(rows, device=logits.device)[self._requests]
        # first pieces have shifts of their own, which count for what a node's tokens are likely without it
        own = logits[places, self._tokens].float() + self._before
        grown = self._log_sums(own + self._going_on) - self._log_sums(own)
        # a grammar that masks all tokens of a node leaves nothing to decide there
        kept = self._going_on - torch.where(grown.isfinite(), grown, 0.0)[self._nodes]
        if self._waiting is not None and self._ended is not None:
            self._values[self._waiting.places] = self._ended
        values = self._values.view(-1)
        values[self._places] = self._before
        values.index_add_(0, self._places, kept)
        if self._waiting is not None:
            self._shift_pending(self._waiting, logits, rows)
        return self._values

    def _shift_pending(self, waiting: Continuations, logits: Tensor, rows: Sequence[int]) -> None:
        """Shift the tokens that go on with pending spellings, and all others together against them.

        Those others keep the shifts that they have, and together the probability that the control's end of
        the spelling gives them.
        """
        own = logits[torch.tensor(rows, device=logits.device)[waiting.places]].float()
        own[waiting.owners, waiting.tokens] = -torch.inf
        shifts = self._values[waiting.places]
        grown = (own + shifts).logsumexp(dim=1) - own.logsumexp(dim=1)
        grown = torch.where(grown.isfinite(), grown, 0.0)  # a grammar masks all others
        shifts += (waiting.ending - grown)[:, None]
        shifts[waiting.owners, waiting.tokens] = waiting.values
        self._values[waiting.places] = torch.where(self.finite[waiting.places, None], shifts, 0.0)

    def _log_sums(self, terms: Tensor) -> Tensor:
        """float32 [nodes]: the logarithm of the sum of exp(`terms`), float32 [m], of each node."""
        most = terms.new_full((self._count,), -torch.inf)
        most = most.scatter_reduce(0, self._nodes, terms, "amax")
        sums = torch.zeros_like(most).index_add_(0, self._nodes, (terms - most[self._nodes]).exp())
        return sums.log() + most
