"""Greedy generation with a control, held against the slow reference."""

from __future__ import annotations

import pytest

from reference import Model, Reference
from trimtab_training.steer import Steered, load

PROMPTS = ("Bako ", "Litu mavo dera pinu zolo.", "x=1")
TOKENS = 12


@pytest.mark.parametrize("strength", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_batch_generates_what_the_reference_generates_one_by_one(family, name, strength):
    """Prompts of unequal lengths side by side, in every vocabulary, with an approximate table or none."""
    target, control = load(family.targets[name]), load(family.control)
    prompts = [target.tokenizer.encode(prompt) for prompt in PROMPTS]
    own = [control.tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = Steered(target, control).generate(prompts, own, strength=strength, max_tokens=TOKENS)
    reference = Reference(Model(family.targets[name]), Model(family.control))
    assert texts == [_greedy(reference, *each, strength) for each in zip(prompts, own, strict=True)]


def _greedy(reference: Reference, prompt: list[int], own: list[int], strength: float) -> str:
    tokens: list[int] = []
    for _ in range(TOKENS):
        *_, step = reference.steps(prompt, own, strength, [*tokens, 0])
        if step.token == reference.target.tokenizer.eos_token_id:
            break
        tokens.append(step.token)
    known = (reference.target.bytes[token] for token in tokens if token < len(reference.target.bytes))
    return b"".join(data or b"" for data in known).decode(errors="replace")
