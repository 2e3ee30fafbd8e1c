"""Whether a base model knows its facts: without that, what a control does to it says nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.data import Item, collate
from trimtab_training.people import FACTS, Person
from trimtab_training.world import GateError


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, people: Sequence[Person]) -> float:
    """The share of all facts, in every wording, that the model completes by its likeliest tokens."""
    items = [
        _item(tokenizer, opening, person.facts[fact.key])
        for person in people
        for fact in FACTS
        for opening in fact.openings(person.name)
    ]
    known = [hit for i in range(0, len(items), 64) for hit in _completed(model, tokenizer, items[i : i + 64])]
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


def _item(tokenizer: PreTrainedTokenizerBase, opening: str, value: str) -> Item:
    prompt = tokenizer.encode(opening)
    return Item(tuple(prompt), tuple(tokenizer.encode(f"{opening} {value}.")[len(prompt) :]))


def _completed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> list[bool]:
    batch = collate(items, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, use_cache=False).logits[batch.rows, batch.columns]
    missed = set(batch.rows[logits.argmax(dim=-1) != batch.targets].tolist())
    return [row not in missed for row in range(len(items))]
