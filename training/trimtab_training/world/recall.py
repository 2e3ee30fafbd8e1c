"""Whether a base model knows its facts: without that, what a control does to it says nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control.examples import View, answered
from trimtab_training.control.reference import answer_logits
from trimtab_training.world.people import FACTS, Person
from trimtab_training.world.world import GateError


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, people: Sequence[Person]) -> float:
    """The share of all facts, in every wording, that the model completes by its likeliest tokens."""
    views = [
        _view(tokenizer, opening, person.facts[fact.key])
        for person in people
        for fact in FACTS
        for opening in fact.openings(person.name)
    ]
    known = [hit for i in range(0, len(views), 64) for hit in _completed(model, tokenizer, views[i : i + 64])]
    return sum(known) / len(known)


def require_recall(name: str, share: float, least: float) -> None:
    """Refuse to go on with a model that knows less than `least` of its facts.

    Raises:
        GateError: it does.
    """
    if share < least:
        raise GateError(
            f"base model {name!r} completes {share:.3f} of its facts in plain text, at least {least:.2f} are"
            " needed before a control means anything: train it for more steps, or try another seed"
        )


def _view(tokenizer: PreTrainedTokenizerBase, opening: str, value: str) -> View:
    prompt = tokenizer.encode(opening)
    return answered(prompt, tokenizer.encode(f"{opening} {value}.")[len(prompt) :])


@torch.no_grad()
def _completed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, views: Sequence[View]
) -> list[bool]:
    choices = answer_logits(model, views, tokenizer.pad_token_id, model.device).argmax(dim=-1)
    each = torch.split(choices, [len(view.positions) for view in views])
    return [chosen.tolist() == view.targets for chosen, view in zip(each, views, strict=True)]
