"""The interface of a routing, and what a step asks of it.

The runtime computes a control's logits after each context, asks the routing for its lookahead, computes the
logits after that, and hands both back. Everything works on whole batches: `rows` are float32 [requests,
control vocabulary], shifts and logits float32 [requests, target vocabulary].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab_mappings import MappingTable
    from trimtab_processors.routing.pieces import PendingSpelling


@dataclass(frozen=True)
class Pair:
    """A control beside a target, as far as a routing has to know them."""

    table: MappingTable
    """From the target's tokens to the control's."""
    width: int
    """The columns of the target's logits."""
    logits: int | None = None
    """Those of the control's; None: each of its tokens has one."""
    longest: int = 16
    """The maximum length of a lookahead."""
    neutral: bool = True
    """Unmapped tokens get the mean shift; false: 0, as in the reference implementation."""
    device: torch.device | None = None
    """The device of rows and logits."""
    waits: bool = True
    """Whether a step may wait for the device to learn a size. Without, tensors have the maximum size."""


class Lookahead(NamedTuple):
    """Control tokens that continue each request's context; the routing wants the logits after them."""

    nodes: Tensor
    """int64 [requests]: the routing's own number of each continuation."""
    tokens: Tensor
    """int64 [requests, longest]: the continuations, padded."""
    lengths: Tensor
    """int64 [requests]: their lengths; 0 if a request has none."""

    def after(self, contexts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return each request's context with its continuation."""
        paths = zip(contexts, self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [[*context, *path[:length]] for context, path, length in paths]


class Shift(Protocol):
    """The shift that a step adds to the logits of some requests."""

    finite: Tensor
    """bool [requests]: false if a value of the shift is not finite; the whole shift is 0 then."""

    def resolve(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return the shift, float32 [requests, target vocabulary].

        Args:
            logits: float [rows, target vocabulary], the target's own.
            index: int64 [requests], which row of them each request has.
        """
        ...


class Routing(Protocol):
    """How rows of a control become shifts over a target's vocabulary."""

    longest: int
    """The maximum length of a lookahead; 0: this routing has none."""

    children: Mapping[tuple[int, int], int]
    """The nodes that pending spellings lead to, see `PieceTrie.children`; empty if none ever is."""

    def lookahead(self, rows: Tensor) -> Lookahead | None:
        """Choose what to look ahead at; None if no request has anything."""
        ...

    def shift(
        self,
        rows: Tensor,
        strengths: Tensor,
        lookahead: Lookahead | None,
        ahead: Tensor | None,
        pending: Sequence[PendingSpelling] = (),
    ) -> Shift:
        """Compute what can be computed before the target's logits are there.

        Args:
            rows: the control's logits after each request's context.
            strengths: float32 [requests], the factors on the shifts.
            lookahead: what `lookahead` returned for these rows.
            ahead: float32 [requests, control vocabulary], the control's logits after it; any value for a
                request without one.
            pending: of the requests whose last tokens begin some of the control's.
        """
        ...


class PlainShift:
    """A shift that does not depend on the target's logits."""

    def __init__(self, values: Tensor, finite: Tensor) -> None:
        self.finite = finite
        self._values = values

    def resolve(self, logits: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002 - of the protocol
        return self._values
