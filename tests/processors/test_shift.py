"""The mathematics of control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab_processors.routing.pm_mined import PmMinedRouting
from trimtab_processors.routing.shift import guarded, scaled

MAPPING = np.array([2, 0, -1, 1], dtype=np.int32)
ROW = torch.tensor([[1.0, 2.0, 6.0]])


def test_a_mapped_token_gets_the_shift_of_its_counterpart_and_an_unmapped_one_the_mean():
    """Columns past the mapping, the padding of a model's vocabulary, count as unmapped."""
    assert PmMinedRouting(MAPPING, width=5).routed(ROW).tolist() == [[6.0, 1.0, 3.0, 2.0, 3.0]]


def test_the_compatibility_mode_gives_an_unmapped_token_nothing():
    """As the reference implementation does."""
    assert PmMinedRouting(MAPPING, width=5, neutral=False).routed(ROW).tolist() == [[6.0, 1.0, 0.0, 2.0, 0.0]]


def test_a_logits_row_narrower_than_the_vocabulary_cuts_the_mapping():
    """A tokenizer may know more tokens than the model has logits."""
    assert PmMinedRouting(MAPPING, width=2).routed(ROW).tolist() == [[6.0, 1.0]]


def test_nothing_mapped_shifts_nothing():
    """The mean of no shift is 0, not NaN."""
    assert PmMinedRouting(np.array([-1, -1], dtype=np.int32), width=2).routed(ROW).tolist() == [[0.0, 0.0]]


def test_a_control_token_that_nothing_is_mapped_to_may_be_anything():
    """A control may forbid tokens of its own; the mean is over the mapped ones."""
    row = torch.tensor([[1.0, -torch.inf, 3.0]])
    assert PmMinedRouting(np.array([0, 2, -1], dtype=np.int32), width=3).routed(row).tolist() == [
        [1.0, 3.0, 2.0]
    ]


def test_the_arbitrary_constant_of_a_shift_does_not_show():
    """Training cannot see a constant on the control's logits; neither can the controlled distribution."""
    logits, routing = torch.randn(1, 5), PmMinedRouting(MAPPING, width=5)
    near, far = ((logits + 1.5 * routing.routed(ROW + constant)).softmax(dim=1) for constant in (0.0, -10.0))
    torch.testing.assert_close(near, far)


def test_the_objectives_of_training_are_one_distribution_at_inference():
    """log_softmax on either side subtracts one number from the row where every token is mapped."""
    base, delta = torch.randn(2, 3), torch.randn(2, 3)
    routing = PmMinedRouting(np.array([1, 2, 0], dtype=np.int32), width=3)
    add = (base + routing.routed(delta)).softmax(dim=1)
    torch.testing.assert_close((base.log_softmax(dim=1) + routing.routed(delta)).softmax(dim=1), add)
    normalized = base.log_softmax(dim=1) + routing.routed(delta.log_softmax(dim=1))
    torch.testing.assert_close(normalized.softmax(dim=1), add)


def shifted(logits, rows, shift, strengths, *, top_k=None, min_p=None):
    """What a step does: scale, then add; which rows were finite."""
    values, finite = scaled(torch.tensor(shift), torch.tensor(strengths))
    index, none = torch.tensor(rows), [0] * len(rows)
    logits.index_add_(0, index, guarded(values, logits, index, top_k or none, min_p or none))
    return finite.tolist()


def test_each_row_gets_its_own_strength_and_the_others_none():
    """Rows of the batch that are not under control stay to the bit."""
    logits = torch.randn(4, 2)
    before = logits.clone()
    assert shifted(logits, [3, 1], [[1.0, 2.0], [4.0, 8.0]], [0.5, -1.0]) == [True, True]
    torch.testing.assert_close(logits - before, torch.tensor([[0, 0], [-4.0, -8.0], [0, 0], [0.5, 1.0]]))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])


def test_a_masked_token_stays_masked():
    """Adding to -inf leaves -inf, so that structured output stays valid."""
    logits = torch.tensor([[-torch.inf, 0.0]])
    shifted(logits, [0], [[1e30, 1.0]], [10.0])
    assert logits.tolist() == [[-torch.inf, 10.0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_shift_that_is_not_finite_leaves_its_row_alone(broken):
    """One broken control costs nobody their request."""
    logits = torch.ones(2, 2)
    assert shifted(logits, [0, 1], [[broken, 1.0], [1.0, 1.0]], [1.0, 1.0]) == [False, True]
    assert logits.tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_a_shift_that_its_strength_makes_infinite_leaves_its_row_alone():
    """What counts is what would be added."""
    logits = torch.tensor([[-torch.inf, 0.0]])
    assert shifted(logits, [0], [[1e38, 1.0]], [10.0]) == [False]
    assert logits.tolist() == [[-torch.inf, 0.0]]


def test_a_guarded_row_is_shifted_only_where_the_target_is_likely():
    """Each row has a guard of its own, or none; one that is wider than the vocabulary guards nothing."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    shifted(logits, [2, 0, 1], [[10.0] * 3] * 3, [1.0] * 3, top_k=[1, 2, 0])
    assert logits.tolist() == [[13.0, 1.0, 12.0], [13.0, 11.0, 12.0], [13.0, 1.0, 2.0], [3.0, 1.0, 2.0]]
    shifted(logits, [3], [[10.0] * 3], [1.0], top_k=[4])
    assert logits[3].tolist() == [13.0, 11.0, 12.0]


def test_a_guard_lets_nothing_through_a_mask():
    """Where fewer tokens are allowed than the guard lets through."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    shifted(logits, [0], [[10.0] * 3], [1.0], top_k=[2])
    assert logits.tolist() == [[-torch.inf, 10.0, -torch.inf]]


def test_a_token_that_is_far_less_likely_than_the_likeliest_keeps_its_logit():
    """`min_p` is a share of the likeliest token's probability; with a `top_k` beside it both must hold."""
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05])
    logits = probabilities.log().repeat(4, 1) + torch.tensor([[0.0], [50.0], [0.0], [0.0]])
    before = logits.clone()
    shifted(logits, [0, 1, 2, 3], [[10.0] * 4] * 4, [1.0] * 4, top_k=[0, 0, 1, 0], min_p=[0.4, 0.15, 0.15, 0])
    kept = (logits - before) > 5
    assert kept.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
