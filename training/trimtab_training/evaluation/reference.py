"""A slow reference: controlled logits from their definition, one answer and one token at a time, every
context whole and every forward pass from the beginning. Of the runtime it shares only the routings, which are
pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_mappings import cached_table, load_encoder, load_vocabulary
from trimtab_processors.control import MOST_LOOKAHEAD
from trimtab_processors.pack import PM_MINED, beam_of, load_pack
from trimtab_processors.path_routing import PathRouting, Spellings
from trimtab_processors.routing import PmMined, Routing
from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.target import LoadedTarget


class SlowReference:
    """A target, and a pack that is applied to it. Contexts longer than the control's window are not cut."""

    def __init__(self, target: LoadedTarget, location: str, tables: Path) -> None:
        pack = load_pack(location)
        self._target = target
        self._vocabulary = load_vocabulary(target.name)
        self._encoder = load_encoder(pack.components[0].model)
        self._table = cached_table(self._vocabulary, self._encoder, tables)
        self._components = [
            (AutoModelForCausalLM.from_pretrained(component.model, dtype=torch.float32), component.weight)
            for component in pack.components
        ]

    def logits(
        self, prompt: Sequence[int], control_prompt: Sequence[int], answer: Sequence[int], setting: Setting
    ) -> Iterator[Tensor]:
        """The controlled logits before each token of `answer`: float32 [target vocabulary]."""
        for position in range(len(answer)):
            said = answer[:position]
            own = _last_row(self._target.model, [*prompt, *said])[: self._target.width]
            yield own + self._shift([*control_prompt, *self.encode(said)], own, setting)

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

    def _shift(self, context: Sequence[int], own: Tensor, setting: Setting) -> Tensor:
        def further(asked: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
            return torch.stack([self._row([*context, *path]) for _, path in asked])

        routed = self._routing(setting.routing or PM_MINED).route(
            self._row(context)[None], torch.tensor([setting.strength]), further
        )
        return routed.over(own[None], [0])[0]

    def _row(self, context: Sequence[int]) -> Tensor:
        """float32 [control vocabulary]: the weighted sum of the components' logits."""
        rows = [weight * _last_row(model, context) for model, weight in self._components]
        return torch.stack(rows).sum(dim=0)

    def _routing(self, name: str) -> Routing:
        if name == PM_MINED:
            return PmMined(self._table.mapping, self._target.width)
        window = min(model.config.max_position_embeddings for model, _ in self._components)
        longest = min(MOST_LOOKAHEAD, window // 4)
        return PathRouting(Spellings(self._table, self._target.width, longest=longest), *beam_of(name))


@torch.no_grad()
def _last_row(model: torch.nn.Module, context: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    row: Tensor = model(input_ids=torch.tensor([[*context]], device=device)).logits[0, -1]
    return row.float().cpu()
