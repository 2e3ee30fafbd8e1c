"""What the sum of template and control is trained towards."""

from __future__ import annotations

import math

import torch

from trimtab_training.objectives import FORGET_BOUND, OBJECTIVES, controlled_log_probs

TEMPLATE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
TARGETS = torch.tensor([1, 2])


def test_a_control_without_a_word_leaves_the_templates_distribution():
    """So training starts from the template, at whatever strength."""
    for strength in (0.0, 1.5):
        torch.testing.assert_close(controlled_log_probs(TEMPLATE, torch.zeros(2, 3), strength), TEMPLATE)


def test_the_shift_acts_at_its_strength():
    """exp(strength * shift) reweighs the template's probabilities."""
    shift = torch.tensor([[0.0, math.log(4), 0.0], [0.0, 0.0, 0.0]])
    first = controlled_log_probs(TEMPLATE, shift, 0.5)[0].exp()
    torch.testing.assert_close(first, torch.tensor([0.5, 0.5, 0.25]) / 1.25)


def test_imitating_is_the_cross_entropy_of_the_answer():
    """In nats, token by token."""
    loss = OBJECTIVES["imitate"](TEMPLATE, TEMPLATE, TARGETS)
    torch.testing.assert_close(loss, torch.tensor([math.log(4), -math.log(0.8)]))


def test_forgetting_is_its_negative_until_a_token_counts_as_forgotten():
    """Past the bound there is nothing more to gain: neither loss nor gradient."""
    near = torch.tensor([[-1.0, -2.0], [-9.0, -0.1]], requires_grad=True)
    loss = OBJECTIVES["forget"](near, near, torch.tensor([0, 0]))
    torch.testing.assert_close(loss, torch.tensor([-1.0, -FORGET_BOUND]))
    loss.sum().backward()
    assert near.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_retaining_costs_nothing_where_nothing_has_changed():
    """And the divergence from the template elsewhere."""
    retain = OBJECTIVES["retain"]
    torch.testing.assert_close(retain(TEMPLATE, TEMPLATE, TARGETS), torch.zeros(2), atol=1e-6, rtol=0)
    moved = torch.full((2, 3), 1 / 3).log()
    expected = (TEMPLATE.exp() * (TEMPLATE - moved)).sum(dim=1)
    torch.testing.assert_close(retain(moved, TEMPLATE, TARGETS), expected)
