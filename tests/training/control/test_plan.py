"""Which records a step takes."""

from __future__ import annotations

from trimtab_training.control.plan import Plan


def test_each_pass_takes_every_record_once_in_an_order_of_its_own():
    plan = Plan([6], [2], seed=1)
    first = [place for step in range(3) for place in plan.records(0, step)]
    second = [place for step in range(3, 6) for place in plan.records(0, step)]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_a_batch_may_reach_into_the_next_pass():
    plan = Plan([3], [2], seed=1)
    taken = [place for step in range(3) for place in plan.records(0, step)]
    assert sorted(taken[:3]) == sorted(taken[3:]) == [0, 1, 2]


def test_the_first_data_set_counts_the_epochs():
    plan = Plan([10, 1000], [4, 4], seed=1)
    assert plan.steps(2) == 5
    assert plan.epoch(5) == 2


def test_a_step_is_the_same_whatever_came_before_it():
    """So that a run can go on from any step."""
    early, late = Plan([50, 9], [4, 2], seed=1), Plan([50, 9], [4, 2], seed=1)
    for step in range(20):
        early.records(0, step)
    assert early.records(0, 20) == late.records(0, 20)
    assert early.strength(20, 0.5, 1.5) == late.strength(20, 0.5, 1.5)


def test_another_seed_takes_others():
    assert Plan([50], [8], seed=1).records(0, 0) != Plan([50], [8], seed=2).records(0, 0)


def test_strengths_fill_their_range():
    plan = Plan([1], [1], seed=1)
    drawn = [plan.strength(step, 0.5, 1.5) for step in range(200)]
    assert 0.5 <= min(drawn) < 0.55
    assert 1.45 < max(drawn) <= 1.5
