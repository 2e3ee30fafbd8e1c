"""The control runtime: requests in, shifts out, one step at a time. It knows nothing of vLLM."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab_processors import metrics
from trimtab_processors.alignment import Alignment, common_prefix, dropped_tokens
from trimtab_processors.control import Control, Target
from trimtab_processors.divergence import Sample, kl_divergence
from trimtab_processors.model import CachedSequence
from trimtab_processors.parameters import SEVERAL
from trimtab_processors.routing.pieces import PendingSpelling
from trimtab_processors.routing.shift import guarded
from trimtab_processors.settings import DEFAULT_CACHE_BYTES, DEFAULT_KL_EVERY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from trimtab_processors.parameters import Parameters
    from trimtab_processors.routing.base import Lookahead, Routing, Shift

logger = logging.getLogger(__name__)


class Advance(NamedTuple):
    """What it took to bring a request's contexts up to date; the first three as in `AlignmentCounts`."""

    tokens: int
    exact: int
    realignments: int
    rolled_back: int
    """Computed tokens that a new alignment dropped."""


class Before(NamedTuple):
    """What a control said before the spelling that is pending."""

    begun: int
    """After how many tokens of output."""
    row: Tensor | None
    """float32 [control vocabulary]; None where it had nothing to go on from."""


class Request:
    """A request under control, from its first step to its last."""

    def __init__(
        self,
        control: Control,
        parameters: Parameters,
        prompt: Sequence[int],
        output: list[int],
        model_name: str,
    ) -> None:
        self.control = control
        self.routing = control.routing_of(parameters)
        self.strength = control.strength_of(parameters)
        self.top_k, self.min_p = parameters.top_k or 0, parameters.min_p or 0.0
        self._until = parameters.until
        self.sequences = [CachedSequence() for _ in control.parts]
        self._output = output
        self._seen = 0
        self._prompt = control.prompt(prompt, parameters.prompt)
        self._alignment = self._align()
        self.last_row: Tensor | None = None
        """float32 [control vocabulary]: what the control said in the last step; None where nobody asks."""
        self._before: Before | None = None
        """What the control said before the pending spelling, once it is known."""
        self._dropped = 0
        self._resumed = len(output)
        """Output that it had when it was taken up: counted when it was new."""
        self._labels = (model_name, control.name)
        self._shifted_at = -1
        """After how many tokens of output it was last shifted."""

    def advance(self) -> Advance:
        """Bring the control's contexts up to what the target has generated."""
        if len(self._output) < self._seen:
            # vLLM takes tokens back where loading a request's KV cache fails.
            self._seen, self._alignment = 0, self._align()
            self._resumed, self.last_row = len(self._output), None
            self._before = None
        before = self._alignment.counts
        kept = self._alignment.extend(self._output[self._seen :])
        is_new = self._seen >= self._resumed
        self._look_before()
        self._seen = len(self._output)
        tokens, kept = self._window(self._alignment.tokens, kept)
        lost = sum(sequence.change(tokens, kept) for sequence in self.sequences)
        now = self._alignment.counts
        if not is_new:
            before = now
        return Advance(
            now.tokens - before.tokens, now.exact - before.exact, now.realignments - before.realignments, lost
        )

    def _look_before(self) -> None:
        """Keep the last step's row if a spelling began after it; drop the row of a spelling that ended."""
        begun, row = self._alignment.begun, self.last_row
        if self._alignment.pending is None or (self._before and self._before.begun != begun):
            self._before = None
        if self._alignment.pending is not None and begun == self._seen and row is not None:
            self._before = Before(begun, row.clone())

    def _align(self) -> Alignment:
        return Alignment(self.control.aligner, self._prompt, self.routing.children)

    def pending(self, place: int) -> PendingSpelling | None:
        """What is pending, for the request's `place` among the rows of a step."""
        node = self._alignment.pending
        if node is None or self._before is None or self._before.row is None:
            return None
        return PendingSpelling(place, node, self._before.row)

    @property
    def is_behind(self) -> bool:
        """Whether a spelling is pending, and what the control said before it has yet to be computed."""
        return self._alignment.pending is not None and self._before is None

    def rewind(self) -> None:
        """Make the contexts those before the pending spelling, until `restore`."""
        alignment = self._align()
        alignment.extend(self._output[: self._alignment.begun])
        self._change(self._cut(alignment.tokens, self._dropped_of(alignment.tokens)))

    def restore(self) -> None:
        """Keep the row that was computed, and make the contexts what they were before `rewind`."""
        self._before = Before(self._alignment.begun, self.row if self.has_context else None)
        self._change(self._cut(self._alignment.tokens, self._dropped))

    def _change(self, tokens: list[int]) -> None:
        for sequence in self.sequences:
            sequence.change(tokens, common_prefix(sequence.tokens, tokens))

    def _window(self, tokens: list[int], kept: int) -> tuple[list[int], int]:
        """Cut the context to the control's window; `kept` comes back in the coordinates of what is left."""
        dropped = self._dropped_of(tokens)
        if not dropped and not self._dropped:
            return tokens, kept
        head = int(self.control.keeps_first(tokens))
        if dropped != self._dropped:
            metrics.TRUNCATIONS.labels(*self._labels).inc()
            self._dropped, kept = dropped, min(kept, head)
        return self._cut(tokens, dropped), max(kept - dropped, min(kept, head))

    def _dropped_of(self, tokens: Sequence[int]) -> int:
        return dropped_tokens(len(tokens), self.control.max_context - self.routing.longest)

    def _cut(self, tokens: list[int], dropped: int) -> list[int]:
        head = int(self.control.keeps_first(tokens))
        return tokens[:head] + tokens[head + dropped :] if dropped else tokens

    @property
    def has_context(self) -> bool:
        """Whether there is anything for the control to go on from."""
        return bool(self.sequences[0].tokens)

    @property
    def row(self) -> Tensor:
        """float32 [control vocabulary], of a request that has a context."""
        return self.control.row(self.sequences)

    def go_on(self, path: Sequence[int]) -> None:
        """Let `row` be what the control would say after `path`; the next `advance` takes it back."""
        for sequence in self.sequences:
            sequence.go_on(path)

    @property
    def is_over(self) -> bool:
        """Whether the control has let go: it has steered as many tokens as the request wants."""
        return self._until is not None and len(self._output) >= self._until

    def counts(self) -> bool:
        """Whether this is the first row after these tokens: those of a half-read prompt are discarded."""
        first = self._shifted_at != self._seen
        self._shifted_at = self._seen
        return first


@dataclass(frozen=True)
class Steering:
    """What a step adds to the logits of the requests that have one control and one routing."""

    control: Control
    requests: Sequence[Request]
    shift: Shift


class Runtime:
    """The controls of one engine, and what they compute in a step."""

    def __init__(
        self,
        target: Target,
        controls: Mapping[str, str],
        *,
        tables: Path,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        neutral: bool = True,
        routing: str | None = None,
        kl_every: int = DEFAULT_KL_EVERY,
    ) -> None:
        """Load every control of `controls`, name to pack, beside `target`.

        Args:
            target: the model that is steered.
            controls: names and where their packs are.
            tables: the directory of mapping tables.
            cache_bytes: the size of each control's pool of keys and values, in bytes.
            neutral: how unmapped tokens are shifted, see `Pair`.
            routing: the name of the one for requests that do not say; None: as each pack says.
            kl_every: on one step of so many it is measured how far control moves the target; 0: on none.
        """
        self._target = target
        self._make = partial(
            Control,
            target=target,
            tables=tables,
            cache_bytes=cache_bytes,
            neutral=neutral,
            routing=routing,
        )
        self._controls: dict[str, Control] = {}
        for name, location in controls.items():
            self.install(self.load(name, location))
        self._steering: list[Steering] = []
        self._sample = Sample(kl_every)

    @property
    def controls(self) -> Sequence[Control]:
        """Those that a request may name."""
        return [*self._controls.values()]

    def load(self, name: str, location: str) -> Control:
        """Make a control ready, in whatever thread; nobody has it before `install`.

        Raises:
            PackError, VocabularyError: the pack can't be used; the message names it and the reason.
        """
        return self._make(name, location)

    def install(self, control: Control) -> None:
        """Let requests name `control`, between two steps."""
        self._controls[control.name] = control
        blocks = sum(part.model.pool.blocks for part in control.parts)
        metrics.announce(self._target.name, control.name, blocks)

    def unload(self, name: str) -> None:
        """Let no further request name a control, between two steps; it goes with the last that has it."""
        self._controls.pop(name, None)
        self._steering = []  # the last step's, which would keep it
        metrics.withdraw(self._target.name, name)

    def open(self, parameters: Parameters, prompt: Sequence[int], output: list[int]) -> Request | None:
        """Take a request up, anew or resumed with the `output` that it has already.

        Args:
            parameters: the control that it wants.
            prompt: the target's prompt, in target tokens.
            output: the list to which the engine appends the tokens that it generates.

        Returns:
            None where this engine has no such control, or its strength is 0: the request goes on without.
        """
        control = self._controls.get(parameters.control)
        if control is None:
            logger.error("no control %r here, a request goes on without it", parameters.control)
            metrics.UNKNOWN.labels(self._target.name).inc()
            return None
        if not control.strength_of(parameters):
            return None
        metrics.REQUESTS.labels(self._target.name, control.name).inc(not output)
        return Request(control, parameters, prompt, output, self._target.name)

    def close(self, request: Request) -> None:
        """Give back what the request holds."""
        for part, sequence in zip(request.control.parts, request.sequences, strict=True):
            part.model.release(sequence)
        self._count_blocks(request.control)

    def step(self, requests: Sequence[Request]) -> None:
        """Compute what `apply` will add for `requests`, each model once for all of them."""
        by_control: defaultdict[Control, list[Request]] = defaultdict(list)
        for request in requests:
            if not request.is_over:
                by_control[request.control].append(request)
            elif any(sequence.blocks for sequence in request.sequences):
                self.close(request)
        self._steering = []
        for control, members in by_control.items():
            started = time.perf_counter()
            self._count_advances(control, [request.advance() for request in members])
            self._catch_up(control, [request for request in members if request.is_behind])
            self._compute(control, members)
            self._route(control, [request for request in members if request.has_context])
            self._count_blocks(control)
            seconds = time.perf_counter() - started
            metrics.FORWARD_SECONDS.labels(self._target.name, control.name).inc(seconds)

    def _catch_up(self, control: Control, requests: Sequence[Request]) -> None:
        """Compute the rows before pending spellings of requests that were taken up behind them."""
        if not requests:
            return
        for request in requests:
            request.rewind()
        self._compute(control, requests)
        for request in requests:
            request.restore()

    def _compute(self, control: Control, requests: Sequence[Request]) -> None:
        """Compute the rows that are missing, in one batch for each of the control's models."""
        for place, part in enumerate(control.parts):
            sequences = [request.sequences[place] for request in requests]
            part.model.run([sequence for sequence in sequences if sequence.needs_row])

    def _route(self, control: Control, requests: Sequence[Request]) -> None:
        by_routing: defaultdict[Routing, list[Request]] = defaultdict(list)
        for request in requests:
            by_routing[request.routing].append(request)
        for routing, members in by_routing.items():
            strengths = torch.tensor([request.strength for request in members], device=self._target.device)
            rows = _rows(members)
            pending = [held for i, request in enumerate(members) if (held := request.pending(i))]
            lookahead = routing.lookahead(rows)
            ahead = None if lookahead is None else self._look_ahead(control, members, lookahead)
            shift = routing.shift(rows, strengths, lookahead, ahead, pending)
            if routing.children:
                for request, row in zip(members, rows, strict=True):
                    request.last_row = row
            self._steering.append(Steering(control, members, shift))

    def _look_ahead(self, control: Control, requests: Sequence[Request], lookahead: Lookahead) -> Tensor:
        """Return the rows after what is looked ahead at, float32 [requests, control vocabulary]."""
        paths = zip(lookahead.tokens.tolist(), lookahead.lengths.tolist(), strict=True)
        ahead = [(place, path[:length]) for place, (path, length) in enumerate(paths) if length]
        for place, path in ahead:
            requests[place].go_on(path)
        members = [requests[place] for place, _ in ahead]
        self._compute(control, members)
        rows = torch.zeros(len(requests), control.vocab_size, device=self._target.device)
        if members:
            rows[[place for place, _ in ahead]] = _rows(members)
        return rows

    def apply(self, logits: Tensor, requests: Mapping[int, Sequence[Request]]) -> None:
        """Shift `logits`, float [rows, width], in place.

        Args:
            logits: those of the target.
            requests: the requests of the last step, by their row; several of one row are summed.
        """
        row_of = {request: row for row, of_row in requests.items() for request in of_row}
        added = []
        for steering in self._steering:
            members = steering.requests
            index = torch.tensor([row_of[request] for request in members], device=logits.device)
            guards = [each.top_k for each in members], [each.min_p for each in members]
            added.append((index, guarded(steering.shift.resolve(logits, index), logits, index, *guards)))
            self._count_rows(steering)
        steered = {row: of_row for row, of_row in requests.items() if not all(r.is_over for r in of_row)}
        with self._measuring(logits, steered):
            for index, values in added:  # not before every guard has seen the target's own logits
                # -inf in the logits (a grammar's mask) stays -inf
                logits.index_add_(0, index, values.to(logits.dtype))

    @contextmanager
    def _measuring(self, logits: Tensor, requests: Mapping[int, Sequence[Request]]) -> Iterator[None]:
        """Measure, in a sampled step, how far what happens within moves one of the rows."""
        place = self._sample.pick(len(requests)) if requests else None
        if place is None:
            yield
            return
        row, of_row = [*requests.items()][place]
        own = logits[row].clone()
        yield
        control = of_row[0].control.name if len(of_row) == 1 else SEVERAL
        metrics.observe_divergence(self._target.name, control, float(kl_divergence(logits[row], own)))

    def count_step(self, seconds: float, blocked: float) -> None:
        """Count a step with a controlled request, and for how much of it control held it up."""
        metrics.count_step(self._target.name, seconds=seconds, blocked=blocked)

    def _count_rows(self, steering: Steering) -> None:
        of_requests = zip(steering.requests, steering.shift.finite.tolist(), strict=True)
        finite = [ok for request, ok in of_requests if request.counts()]
        metrics.TOKENS.labels(self._target.name, steering.control.name).inc(sum(finite))
        metrics.NON_FINITE.labels(self._target.name, steering.control.name).inc(len(finite) - sum(finite))

    def _count_advances(self, control: Control, advances: Sequence[Advance]) -> None:
        counted = (metrics.ALIGNED, metrics.EXACT, metrics.REALIGNMENTS, metrics.ROLLED_BACK)
        for metric, counts in zip(counted, zip(*advances, strict=True), strict=True):
            metric.labels(self._target.name, control.name).inc(sum(counts))

    def _count_blocks(self, control: Control) -> None:
        used = sum(part.model.pool.used for part in control.parts)
        metrics.BLOCKS.labels(self._target.name, control.name).set(used)


def _rows(requests: Sequence[Request]) -> Tensor:
    """float32 [requests, control vocabulary]; each has one."""
    return torch.stack([request.row for request in requests])
