"""A control, loaded for one target: its models, its alignment and its routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab_mappings import ByteEncoder, Vocabulary, cached_table, load_encoder, load_vocabulary
from trimtab_processors.alignment import Aligner
from trimtab_processors.model import CachedSequence, ControlModel
from trimtab_processors.pack import DEFAULT_ROUTING, PackError, load_pack
from trimtab_processors.routing.base import Pair, Routing
from trimtab_processors.routing.registry import ROUTINGS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from trimtab_processors.pack import Pack
    from trimtab_processors.parameters import Parameters


MAX_LOOKAHEAD = 16
"""The maximum length of a lookahead, in control tokens; never more than a quarter of the control's window."""


@dataclass(frozen=True)
class Target:
    """The model that is steered, as far as a control has to know it."""

    name: str
    encoder: ByteEncoder
    """Its tokenizer."""
    width: int
    """The columns of its logits."""
    device: torch.device

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""
        return self.encoder.vocabulary


@dataclass(frozen=True)
class Part:
    """One model of a control, and its weight in the sum."""

    model: ControlModel
    weight: float


class Control:
    """One control beside one target. Its parts share a vocabulary, so that their rows are summed before
    routing.
    """

    def __init__(
        self,
        name: str,
        location: str,
        target: Target,
        *,
        tables: Path,
        cache_bytes: int,
        neutral: bool,
        routing: str | None,
        routings: Collection[str] = tuple(ROUTINGS),
        waits: bool = True,
    ) -> None:
        """Load the pack at `location` and its mapping table, which is built where `tables` has none.

        Args:
            name: what requests call it.
            location: a directory or a hub id.
            target: the model that is steered.
            tables: the directory of mapping tables.
            cache_bytes: the size of its pool of keys and values, in bytes.
            neutral: how unmapped tokens are shifted, see `Pair`.
            routing: the name of the one for requests that do not say; None: the pack's own.
            routings: the names of those that requests may have.
            waits: whether a routing may wait for the device, see `Pair`.

        Raises:
            PackError, VocabularyError: the pack can't be used; the message names it and the reason.
        """
        pack = load_pack(location)
        self.name = name
        self.location = location
        self.strength = pack.strength
        encoder = load_encoder(pack.components[0].model)
        vocabulary = encoder.vocabulary
        self._require_one_vocabulary(pack, vocabulary)
        self.parts = [
            Part(
                ControlModel(
                    component.model, cache_bytes=cache_bytes // len(pack.components), device=target.device
                ),
                component.weight,
            )
            for component in pack.components
        ]
        self.table = table = cached_table(target.encoder, encoder, tables)
        self._require_logits()
        self.aligner = Aligner(target.vocabulary, encoder, table)
        self.max_context = min(part.model.max_context for part in self.parts)
        self.default_routing = routing or pack.routing or DEFAULT_ROUTING
        """The name of the routing for requests that do not name one."""
        pair = Pair(
            table,
            target.width,
            logits=self.vocab_size,
            longest=min(MAX_LOOKAHEAD, self.max_context // 4),
            neutral=neutral,
            device=target.device,
            waits=waits,
        )
        self.routings: dict[str, Routing] = {each: ROUTINGS[each](pair) for each in routings}
        self._beginning = [*vocabulary.roles.get("bos", ()), *vocabulary.roles.get("eos", ())]

    def _require_one_vocabulary(self, pack: Pack, vocabulary: Vocabulary) -> None:
        for component in pack.components[1:]:
            if load_vocabulary(component.model).tokens != vocabulary.tokens:
                raise PackError(
                    f"control {self.name!r}: {component.model!r} has another vocabulary than"
                    f" {vocabulary.name!r}; the components of a pack must share one"
                )

    def _require_logits(self) -> None:
        used = (self.table.mapping, self.table.segment_ids)
        if (highest := max(int(ids.max(initial=-1)) for ids in used)) >= self.vocab_size:
            raise PackError(
                f"control {self.name!r}: its tokenizer has token {highest}, but its model only"
                f" {self.vocab_size} logits; drop the added tokens from the tokenizer, or resize the model's"
                " embeddings"
            )

    def describe(self) -> dict[str, Any]:
        """What an engine says of it: its name, its pack, how many target tokens are mapped in which way."""
        return {
            "id": self.name,
            "object": "control",
            "root": self.location,
            "strength": self.strength,
            "mapping": {
                "strategy": self.table.strategy,
                "routing": self.default_routing,
                "longest_target_token": self.table.longest_target_token,
                **self.table.coverage._asdict(),
            },
        }

    def strength_of(self, parameters: Parameters) -> float:
        """The factor on the shift that a request gets: its own, or the pack's."""
        return self.strength if parameters.strength is None else parameters.strength

    def routing_of(self, parameters: Parameters) -> Routing:
        """Return the routing that a request gets: its own, or the default."""
        return self.routings[parameters.routing or self.default_routing]

    def prompt(self, target_prompt: Sequence[int], own: Sequence[int] | None) -> list[int]:
        """The control's prompt: `own` where a client has rendered it, else the text of the target's prompt.

        Never empty where the vocabulary has a bos or an eos. Ids that the control does not have are not
        taken.
        """
        if own is None or any(token >= self.vocab_size for token in own):
            own = self.aligner.encoder.tokenizer(self.aligner.prompt_text(target_prompt)).input_ids
        return [token for token in own if token < self.vocab_size] or self._beginning[:1]

    @property
    def vocab_size(self) -> int:
        return min(part.model.vocab_size for part in self.parts)

    def keeps_first(self, tokens: Sequence[int]) -> bool:
        """Whether the first token stays when the context outgrows the window."""
        return tokens[:1] == self._beginning[:1]

    def row(self, sequences: Sequence[CachedSequence]) -> Tensor:
        """float32 [vocabulary]: the weighted sum of the parts' rows."""
        weighted = [
            part.weight * sequence.row[: self.vocab_size]
            for part, sequence in zip(self.parts, sequences, strict=True)
            if sequence.row is not None
        ]
        return torch.stack(weighted).sum(dim=0)
