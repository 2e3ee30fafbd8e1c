"""Greedy generation with a control, held against the slow reference."""

from __future__ import annotations

import pytest
import torch

from reference import Model, PathReference, Reference
from trimtab_training.control.examples import answered
from trimtab_training.world.steer import ROUTINGS, Steered, load

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
    reference = PathReference(Model(family.targets[name]), Model(family.control))
    assert texts == [_greedy(reference, *each, strength) for each in zip(prompts, own, strict=True)]


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize(("routing", "slow"), [("pm-mined", Reference), ("path", PathReference)])
def test_the_loss_of_answers_is_the_references(family, strength, routing, slow):
    """Of all tokens of each answer, in nats, and for answers of unequal lengths."""
    target, control = load(family.targets["b"]), load(family.control)
    prompts, answers = PROMPTS[:2], ("zolo mavo", "=1")
    views = [
        answered(target.tokenizer.encode(prompt), target.tokenizer.encode(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    own = [control.tokenizer.encode(prompt) for prompt in prompts]
    reference = slow(Model(family.targets["b"]), Model(family.control))
    expected = [
        -sum(
            logits.log_softmax(dim=-1)[token]
            for logits, token in zip(
                reference.logits([*view.ids[: view.positions[0]]], prompt, strength, view.targets),
                view.targets,
                strict=True,
            )
        )
        for view, prompt in zip(views, own, strict=True)
    ]
    loss = Steered(target, control, routing).loss(views, own, strength=strength)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-3, rtol=1e-4)


def test_every_routing_steers(family):
    """And no two of them alike."""
    target, control = load(family.targets["b"]), load(family.control)
    view = answered(target.tokenizer.encode(PROMPTS[1]), target.tokenizer.encode("zolo mavo"))
    own = control.tokenizer.encode(PROMPTS[1])
    losses = [Steered(target, control, name).loss([view], [own], strength=1.0).item() for name in ROUTINGS]
    assert len({round(loss, 4) for loss in losses}) == len(ROUTINGS)


def _greedy(reference: Reference, prompt: list[int], own: list[int], strength: float) -> str:
    tokens: list[int] = []
    for _ in range(TOKENS):
        *_, step = reference.steps(prompt, own, strength, [*tokens, 0])
        if step.token == reference.target.tokenizer.eos_token_id:
            break
        tokens.append(step.token)
    known = (reference.target.bytes[token] for token in tokens if token < len(reference.target.bytes))
    return b"".join(data or b"" for data in known).decode(errors="replace")
