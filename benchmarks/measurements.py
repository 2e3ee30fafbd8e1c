"""One round of measurements of controlled decoding, in which all that is compared stands side by side.

The speed of a shared machine drifts by a factor of two or three: only what was measured within seconds of
each other is ever divided by each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from models import Models
from reference_decoding import CachedModel, ReferenceDecoder
from serving import SETTLE_SECONDS, Cores, Load, Server, on_core
from trimtab_mappings import build_table, load_encoder
from trimtab_processors.model import CachedSequence, ControlModel

WITHOUT, SERIES, BESIDE = "without", "series", "beside"
"""The servers: without the plugin; with the control's forward before the target's; and beside it."""
PROMPT = 32  # tokens
LONG_PROMPT = 256  # tokens
AGAINST_REFERENCE = (1, 16)  # requests at once
_STEPS = 10


@dataclass(frozen=True)
class Decode:
    """Decoding with and without control on one server, in tokens a second."""

    server: str
    control: str
    batch: int
    plain: float
    controlled: float
    forward: float
    """Seconds of the control's forward alone, for a step of the batch."""

    @property
    def ratio(self) -> float:
        return self.controlled / self.plain

    @property
    def ceiling(self) -> float:
        """The ratio if the forward alone came on top of the target's step."""
        return 1 / (1 + self.forward * self.plain / self.batch)


@dataclass(frozen=True)
class Off:
    """Decoding without control on a server with the plugin and on one without it, in tokens a second."""

    server: str
    batch: int
    without: float
    plain: float

    @property
    def ratio(self) -> float:
        return self.plain / self.without


@dataclass(frozen=True)
class Against:
    """Controlled decoding against the reference's, in tokens a second."""

    control: str
    batch: int
    reference: float
    ours: float
    realigned: float
    """Share of the reference's tokens after which it tokenized text anew."""

    @property
    def ratio(self) -> float:
        return self.ours / self.reference


@dataclass(frozen=True)
class FirstToken:
    """Time to the first token, in seconds."""

    server: str
    control: str
    plain: float
    controlled: float

    @property
    def ratio(self) -> float:
        return self.controlled / self.plain


@dataclass
class Found:
    """What the rounds have measured."""

    decode: list[Decode] = field(default_factory=list)
    off: list[Off] = field(default_factory=list)
    against: list[Against] = field(default_factory=list)
    first_tokens: list[FirstToken] = field(default_factory=list)


@dataclass
class Forward:
    """A control's forward alone, on the engine's core."""

    directory: str
    core: int
    context: int
    """Tokens of each context."""
    _sequences: dict[int, list[CachedSequence]] = field(default_factory=dict)

    @cached_property
    def _model(self) -> ControlModel:
        return ControlModel(self.directory, cache_bytes=2**28, device=torch.device("cpu"))

    def seconds(self, size: int) -> float:
        """One decode step of `size` requests: the median of some."""
        with on_core(self.core):
            if size not in self._sequences:
                self._sequences[size] = [CachedSequence(tokens=[5] * self.context) for _ in range(size)]
                self._model.run(self._sequences[size])
            return statistics.median(self._step(self._sequences[size]) for _ in range(_STEPS))

    def _step(self, sequences: list[CachedSequence]) -> float:
        for sequence in sequences:
            sequence.change([5] * self.context + [7], self.context)
        start = time.perf_counter()
        self._model.run(sequences)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Bench:
    """What is measured: three servers, the controls alone, and the reference."""

    servers: Mapping[str, Server]
    controls: Sequence[str]
    cores: Cores
    forwards: Mapping[str, Forward]
    references: Mapping[str, ReferenceDecoder]

    def decode(self, load: Load) -> tuple[list[Decode], list[Off]]:
        """Every control on both servers, and the server without the plugin between them."""
        shapes = {_shape(control) for control in self.controls}
        time.sleep(SETTLE_SECONDS)
        alone = {shape: self.forwards[shape].seconds(load.size) for shape in shapes}
        first, last = (SERIES, BESIDE) if load.seed % 2 else (BESIDE, SERIES)
        before = self._compare(self._settled(first).speed, load)
        without = self._settled(WITHOUT).speed(load)
        after = self._compare(self._settled(last).speed, load)
        decoded = [
            Decode(server, control, load.size, plain, controlled, alone[_shape(control)])
            for server, found in ((first, before), (last, after))
            for control, plain, controlled in found
        ]
        off = [Off(first, load.size, without, before[-1][1]), Off(last, load.size, without, after[0][1])]
        return decoded, off

    def first_tokens(self, load: Load) -> Iterator[FirstToken]:
        for server in (SERIES, BESIDE):
            for control, plain, controlled in self._compare(self._settled(server).first_token, load):
                yield FirstToken(server, control, plain, controlled)

    def against(self, loads: Sequence[Load]) -> Iterator[Against]:
        """The reference, then the server whose control has no core of its own, on the same prompts."""
        for control in self.controls:
            time.sleep(SETTLE_SECONDS)
            reference, realigned = self._reference(control, loads[0])
            for load in loads:
                ours = self.servers[SERIES].speed(load, control)
                yield Against(control, load.size, reference, ours, realigned)

    def _reference(self, control: str, load: Load) -> tuple[float, float]:
        """Tokens a second of the reference, and the share of them after which it tokenized text anew."""
        decoder, prompt = self.references[control], load.prompts()[0]
        with on_core(self.cores.engine):
            own_prompt = decoder.control_prompt(prompt)
            decoded = decoder.decode(prompt, own_prompt, load.tokens, greedy=False)
        return 1 / decoded.step, decoded.realignments / load.tokens

    def _settled(self, name: str) -> Server:
        """A server, when the last one has come to rest."""
        time.sleep(SETTLE_SECONDS)
        return self.servers[name]

    def _compare(
        self, measure: Callable[[Load, str | None], float], load: Load
    ) -> list[tuple[str, float, float]]:
        """Measure `load` under each control, right before or after it was measured without.

        Returns:
            The control, what was measured without, and with it; the first is the nearest to the beginning
            that was measured without, the last to the end.
        """
        plain = measure(load, None)
        found = []
        for start in range(0, len(self.controls), 2):
            names = self.controls[start : start + 2]
            controlled = [measure(load, name) for name in names]
            neighbours = (plain, plain := measure(load, None))
            found += list(zip(names, neighbours, controlled, strict=False))
        return found


def make_references(models: Models) -> dict[str, ReferenceDecoder]:
    """The reference under each control, with one target for all."""
    served = load_encoder(str(models.target))
    target = CachedModel(str(models.target))
    references = {}
    for name, path in models.controls.items():
        encoder = load_encoder(str(path))
        table = build_table(served, encoder)
        references[name] = ReferenceDecoder(target, CachedModel(str(path)), served.vocabulary, encoder, table)
    return references


def make_forwards(models: Models, core: int, context: int) -> dict[str, Forward]:
    """One for each shape; what its tokenizer is does not matter to it."""
    return {_shape(name): Forward(str(path), core, context) for name, path in models.controls.items()}


def _shape(control: str) -> str:
    return control.partition("-")[0]
