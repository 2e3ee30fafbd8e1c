"""Routings: how a control's rows become shifts over a target's vocabulary.

Everything here works on whole batches: `rows` are float32 [requests, control vocabulary], shifts and logits
float32 [requests, target vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab_processors.shift import scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trimtab_processors.pieces import PendingSpelling

Further = Callable[[Sequence[tuple[int, Sequence[int]]]], Tensor]
"""Computes further rows, float32 [asked, control vocabulary]. Each is asked for by the place of a row that
there is, and control tokens that go on from that row's context; one call asks for each place once at most.
"""


class Shift(Protocol):
    """What a step adds to the logits of some requests."""

    finite: Tensor
    """bool [requests]: the shift of the others is 0, since something in it is not finite."""

    def over(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The shift, float32 [requests, target vocabulary].

        Args:
            logits: float [rows, target vocabulary], the target's own.
            rows: [requests], where each request's logits are.
        """
        ...


class Routing(Protocol):
    """How rows of a control become shifts over a target's vocabulary."""

    lookahead: int
    """The most control tokens with which it goes on from a context."""

    children: Mapping[tuple[int, int], int]
    """The nodes that pending spellings lead to, see `PieceTrie.children`; none where nothing is pending."""

    def route(
        self, rows: Tensor, strengths: Tensor, further: Further, pending: Sequence[PendingSpelling] = ()
    ) -> Shift:
        """Everything that can be done before the target's logits are there.

        Args:
            rows: float32 [requests, control vocabulary], what the control says after each request's context.
            strengths: float32 [requests], the factors on the shifts.
            further: computes what else of the control is wanted.
            pending: of the requests whose last tokens begin some of the control's.
        """
        ...


class PlainShift:
    """A shift that does not depend on the target's logits."""

    def __init__(self, values: Tensor, finite: Tensor) -> None:
        self.finite = finite
        self._values = values

    def over(self, logits: Tensor, rows: Sequence[int]) -> Tensor:  # noqa: ARG002 - of the protocol
        return self._values


class PmMined:
    """The shift of a target token is that of the one control token that a mapping table names.

    A control's logits carry an arbitrary constant, which training cannot see. So a token without a
    counterpart gets the mean of the shift over the mapped tokens, which leaves it where it was relative to
    them; 0, as in the reference implementation of cross-model control, would boost or suppress it by that
    constant.
    """

    lookahead = 0
    children: Mapping[tuple[int, int], int] = MappingProxyType({})

    def __init__(
        self,
        mapping: NDArray[np.int32],
        width: int,
        *,
        neutral: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the routing for logits of `width` columns.

        Args:
            mapping: int32 [tokens], -1 where nothing fits; columns past its end count as unmapped.
            width: the columns of the target's logits.
            neutral: unmapped tokens get the mean shift; else 0, to reproduce the reference.
            device: where rows and logits live.
        """
        routed = torch.full((width,), -1, dtype=torch.int64)
        routed[: len(mapping)] = torch.from_numpy(mapping[:width].astype(np.int64))
        mapped = routed[routed >= 0]
        self._source = (routed + 1).to(device)
        """int64 [width]: where each token's shift stands, behind that of the unmapped ones."""
        self._neutral = neutral and bool(len(mapped))
        counts = torch.bincount(mapped)
        self._used = counts.nonzero()[:, 0].to(device)
        """int64 [n]: the control tokens that some target token is mapped to."""
        self._weights = (counts[counts > 0] / max(len(mapped), 1)).float().to(device)
        """float32 [n]: the weight of each in the mean over the mapped tokens."""

    def shift(self, rows: Tensor) -> Tensor:
        if self._neutral:
            rest = (rows.index_select(1, self._used) @ self._weights)[:, None]
        else:
            rest = rows.new_zeros(len(rows), 1)
        return torch.cat((rest, rows), dim=1).index_select(1, self._source)

    def route(
        self,
        rows: Tensor,
        strengths: Tensor,
        further: Further,  # noqa: ARG002 - of the protocol
        pending: Sequence[PendingSpelling] = (),  # noqa: ARG002
    ) -> PlainShift:
        return PlainShift(*scaled(self.shift(rows), strengths))
