"""A slow reference: controlled logits from their definition, one answer and one token at a time, every
context whole and every forward pass from the beginning. Of the runtime it shares only the routings, which are
pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_mappings import cached_table, load_encoder
from trimtab_mappings.trie import ROOT
from trimtab_processors.control import MAX_LOOKAHEAD
from trimtab_processors.pack import PM_MINED, load_pack
from trimtab_processors.routing.base import Pair, Routing
from trimtab_processors.routing.pieces import PendingSpelling
from trimtab_processors.routing.registry import ROUTINGS
from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.target import LoadedTarget


class SlowReference:
    """A target, and a pack that is applied to it. Contexts longer than the control's window are not cut."""

    def __init__(self, target: LoadedTarget, location: str, tables: Path) -> None:
        pack = load_pack(location)
        self._target = target
        served = load_encoder(target.name)
        self._vocabulary = served.vocabulary
        self._encoder = load_encoder(pack.components[0].model)
        self._table = cached_table(served, self._encoder, tables)
        self._components = [
            (AutoModelForCausalLM.from_pretrained(component.model, dtype=torch.float32), component.weight)
            for component in pack.components
        ]

    def logits(
        self, prompt: Sequence[int], control_prompt: Sequence[int], answer: Sequence[int], setting: Setting
    ) -> Iterator[Tensor]:
        """The controlled logits before each token of `answer`: float32 [target vocabulary]."""
        routing = self._routing(setting.routing or PM_MINED)
        for position in range(len(answer)):
            said = answer[:position]
            own = _last_row(self._target.model, [*prompt, *said])[: self._target.width]
            node, begun = _pending(said, routing.children)
            contexts = [[*control_prompt, *self.encode(text)] for text in (said, said[:begun])]
            pending = [] if node is None else [PendingSpelling(0, node, self._row(contexts[1]))]
            yield own + self._shift(routing, contexts[0], pending, own, setting.strength)

    def encode(self, tokens: Sequence[int]) -> list[int]:
        """What a target said, in the control's tokens: the text between two special tokens is encoded whole.
        In the control's own vocabulary, the tokens are as they are.
        """
        if self._vocabulary.tokens == self._encoder.vocabulary.tokens:
            return [*tokens]
        encoded: list[int] = []
        run = b""
        for token in tokens:
            if token in self._vocabulary.special:
                encoded += self._encoder.encode_all([run])[0]
                encoded += [counterpart] if (counterpart := int(self._table.mapping[token])) >= 0 else []
                run = b""
            else:
                run += self._vocabulary.tokens[token]
        return [*encoded, *self._encoder.encode(run)[0]]

    def _shift(
        self,
        routing: Routing,
        context: Sequence[int],
        pending: Sequence[PendingSpelling],
        own: Tensor,
        strength: float,
    ) -> Tensor:
        row = self._row(context)[None]
        lookahead = routing.lookahead(row)
        ahead = None if lookahead is None else self._row(lookahead.after([context])[0])[None]
        shift = routing.shift(row, torch.tensor([strength]), lookahead, ahead, pending)
        return shift.resolve(own[None], torch.tensor([0]))[0]

    def _row(self, context: Sequence[int]) -> Tensor:
        """float32 [control vocabulary]: the weighted sum of the components' logits."""
        rows = [weight * _last_row(model, context) for model, weight in self._components]
        return torch.stack(rows).sum(dim=0)

    def _routing(self, name: str) -> Routing:
        window = min(model.config.max_position_embeddings for model, _ in self._components)
        longest = min(MAX_LOOKAHEAD, window // 4)
        return ROUTINGS[name](Pair(self._table, self._target.width, longest=longest))


def _pending(said: Sequence[int], children: Mapping[tuple[int, int], int]) -> tuple[int | None, int]:
    """The node to which the last tokens lead, None if there is none, and how many tokens are before them."""
    node, begun = ROOT, 0
    for place, token in enumerate(said):
        if node < 0 or (node, token) not in children:
            node, begun = ROOT, place
        node = children.get((node, token), ROOT)
    return (node, begun) if node >= 0 else (None, len(said))


@torch.no_grad()
def _last_row(model: torch.nn.Module, context: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    row: Tensor = model(input_ids=torch.tensor([[*context]], device=device)).logits[0, -1]
    return row.float().cpu()
