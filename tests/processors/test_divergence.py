"""How far a control moves a distribution, and on which steps that is measured."""

from __future__ import annotations

import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference

from trimtab_processors.divergence import Sample, kl_divergence


def test_it_is_the_divergence_of_the_controlled_from_the_targets_own():
    own, controlled = torch.randn(40), torch.randn(40)
    expected = reference(Categorical(logits=controlled), Categorical(logits=own))
    torch.testing.assert_close(kl_divergence(controlled, own), expected)


def test_a_constant_moves_nothing():
    own = torch.randn(40)
    assert 0 <= kl_divergence(own + 7, own) < 1e-6


def test_what_a_grammar_masks_adds_nothing():
    own, controlled = torch.randn(40), torch.randn(40)
    own[10:] = controlled[10:] = -torch.inf
    torch.testing.assert_close(kl_divergence(controlled, own), kl_divergence(controlled[:10], own[:10]))


def picked(every: int, rows: int, steps: int) -> list[int | None]:
    sample = Sample(every)
    return [sample.pick(rows) for _ in range(steps)]


def test_one_step_in_so_many_is_measured():
    assert [row is not None for row in picked(4, 2, 9)] == [False, False, False, True] * 2 + [False]
    assert picked(0, 2, 9) == [None] * 9


def test_every_row_has_its_turn():
    assert {*picked(1, 100, 100)} == {*range(100)}
