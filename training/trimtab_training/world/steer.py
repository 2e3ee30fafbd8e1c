"""Greedy generation with a control, in batches, with transformers alone: no server, no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from trimtab_mappings import ByteEncoder, MappingTable, build_table, load_tokenizer, read_vocabulary
from trimtab_processors.alignment import Aligner, Alignment
from trimtab_processors.pack import DEFAULT_ROUTING, PIECES, PM_MINED
from trimtab_processors.routing.base import Pair, Routing
from trimtab_processors.routing.pieces import PendingSpelling
from trimtab_processors.routing.registry import ROUTINGS as RUNTIME_ROUTINGS
from trimtab_training.control.examples import View, collate
from trimtab_training.control.reference import answer_logits

ROUTINGS = {
    "exact": ("exact", PM_MINED),
    "pm-mined": ("pm-mined", PM_MINED),
    "first-segment": ("first-segment", PM_MINED),
    "path": ("pm-mined", "path"),
    "pieces": ("pm-mined", PIECES),
}
"""Of each way to a target's tokens the strategy of its table, and the routing."""
RowsAfter = Callable[[Sequence[Sequence[int]]], Tensor]
"""Gives a control's logits after contexts: float32 [contexts, control vocabulary]."""
_AT_ONCE = 256  # contexts in one call of a model


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(directory: Path) -> Loaded:
    """Load the float32 model and the tokenizer in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return Loaded(model.eval(), load_tokenizer(str(directory)))


def make_routing(name: str, table: MappingTable, width: int) -> Routing:
    """A routing of the control runtime by its name, for logits of `width` columns."""
    return RUNTIME_ROUTINGS[name](Pair(table, width))


class Context(NamedTuple):
    """A control's context, and what is pending at its end."""

    tokens: list[int]
    node: int | None
    """The node of the spelling that is pending; None where none is."""
    before: list[int]
    """The context before that spelling."""


class Following:
    """The control's context of a text that grows by a target's tokens."""

    def __init__(self, aligner: Aligner, prompt: Sequence[int], routing: Routing) -> None:
        self._alignment = Alignment(aligner, prompt, routing.children)
        self._past: list[list[int]] = []

    def context(self) -> Context:
        node, begun = self._alignment.pending, self._alignment.begun
        tokens = list(self._alignment.tokens)
        return Context(tokens, node, tokens if node is None else self._past[begun])

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._past.append(list(self._alignment.tokens))
            self._alignment.extend([token])


def shift_of(
    routing: Routing,
    rows_after: RowsAfter,
    contexts: Sequence[Context],
    logits: Tensor,
    strength: float,
) -> Tensor:
    """What is added to a target's `logits`, float32 [contexts, target vocabulary], as much as these.

    Args:
        routing: how the control's rows reach the target's tokens.
        rows_after: the control.
        contexts: its contexts.
        logits: the target's own.
        strength: the factor on the shift.
    """
    held = [(place, node) for place, context in enumerate(contexts) if (node := context.node) is not None]
    before = rows_after([contexts[place].before for place, _ in held]) if held else ()
    pending = [PendingSpelling(place, node, row) for (place, node), row in zip(held, before, strict=True)]
    strengths = torch.full((len(contexts),), strength)
    tokens = [context.tokens for context in contexts]
    rows = rows_after(tokens)
    lookahead = routing.lookahead(rows)
    ahead = None if lookahead is None else rows_after(lookahead.after(tokens))
    shift = routing.shift(rows, strengths, lookahead, ahead, pending)
    return shift.resolve(logits, torch.arange(len(contexts)))


@torch.no_grad()
def last_rows(model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> Tensor:
    """The logits after each of `contexts`: float32 [contexts, vocabulary]."""
    rows = []
    for start in range(0, len(contexts), _AT_ONCE):
        some = contexts[start : start + _AT_ONCE]
        ids = collate([View(tuple(context), ()) for context in some], 0).ids
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(context) - 1 for context in some])
        rows.append(model.get_output_embeddings()(hidden[torch.arange(len(some)), last]))
    return torch.cat(rows)


def contexts_before(
    aligner: Aligner, prompt: Sequence[int], tokens: Sequence[int], routing: Routing
) -> Iterator[Context]:
    """The control's context before each of a target's `tokens`, which follow its own `prompt`."""
    following = Following(aligner, prompt, routing)
    for token in tokens:
        yield following.context()
        following.extend([token])


class Steered:
    """A target, and a control that is applied to it through a mapping table."""

    def __init__(self, target: Loaded, control: Loaded, routing: str = DEFAULT_ROUTING) -> None:
        """Args: routing: one of `ROUTINGS`."""
        strategy, routing_name = ROUTINGS[routing]
        self._target = target
        self._control = control
        served, encoder = (
            ByteEncoder(loaded.tokenizer, read_vocabulary(loaded.tokenizer, name=name))
            for loaded, name in ((target, "target"), (control, "control"))
        )
        table = build_table(served, encoder, strategy)
        self._aligner = Aligner(served.vocabulary, encoder, table)
        self._routing = make_routing(routing_name, table, target.model.config.vocab_size)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        control_prompts: Sequence[Sequence[int]],
        *,
        strength: float,
        max_tokens: int,
    ) -> list[str]:
        """Go on from each prompt with the likeliest tokens.

        Args:
            prompts: in the target's tokens.
            control_prompts: the same in the control's tokens.
            strength: the factor on the shift; 0 leaves the control out.
            max_tokens: the most tokens to generate.
        """
        pad_id = self._target.tokenizer.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[*[pad_id] * (width - len(prompt)), *prompt] for prompt in prompts])
        mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
        contexts = [Following(self._aligner, prompt, self._routing) for prompt in control_prompts]
        steering = _Steering(self._shift, contexts, width=width, strength=strength)
        with torch.no_grad():
            output = self._target.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                logits_processor=[steering] if strength else [],
            )
        return [self._text(row.tolist()) for row in output[:, width:]]

    @torch.no_grad()
    def loss(
        self, views: Sequence[View], control_prompts: Sequence[Sequence[int]], *, strength: float
    ) -> Tensor:
        """How unlikely the answers are, in nats: float32 [views].

        Args:
            views: in the target's tokens.
            control_prompts: their prompts in the control's tokens.
            strength: the factor on the shift; 0 leaves the control out.
        """
        model, pad_id = self._target.model, self._target.tokenizer.pad_token_id
        logits = answer_logits(model, views, pad_id, model.device)
        if strength:
            contexts = [
                context
                for view, prompt in zip(views, control_prompts, strict=True)
                for context in contexts_before(self._aligner, prompt, view.targets, self._routing)
            ]
            logits = logits + self._shift(contexts, logits, strength)
        targets = torch.tensor([token for view in views for token in view.targets])
        losses = -log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
        return torch.stack(
            [part.sum() for part in torch.split(losses, [len(view.positions) for view in views])]
        )

    def _shift(self, contexts: Sequence[Context], logits: Tensor, strength: float) -> Tensor:
        """What is added to `logits`, float32 [contexts, target vocabulary]."""
        return shift_of(self._routing, partial(last_rows, self._control.model), contexts, logits, strength)

    def _text(self, tokens: list[int]) -> str:
        eos = self._target.tokenizer.eos_token_id
        end = tokens.index(eos) if eos in tokens else len(tokens)
        return self._aligner.text(tokens[:end]).decode("utf-8", errors="replace")


class _Steering(LogitsProcessor):
    """Adds the control's shift to the scores of every step; its contexts are computed from scratch."""

    def __init__(
        self,
        shift: Callable[[Sequence[Context], Tensor, float], Tensor],
        contexts: Sequence[Following],
        *,
        width: int,
        strength: float,
    ) -> None:
        self._shift = shift
        self._contexts = contexts
        self._seen = width
        self._strength = strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: input_ids int64 [requests, tokens], scores float32 [requests, target vocabulary]."""
        for context, new in zip(self._contexts, input_ids[:, self._seen :].tolist(), strict=True):
            context.extend(new)
        self._seen = input_ids.shape[1]
        contexts = [context.context() for context in self._contexts]
        return scores + self._shift(contexts, scores, self._strength)
