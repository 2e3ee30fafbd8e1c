"""Each objective against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab_training.control.objectives import controlled_log_probs, make_objective
from trimtab_training.control.recipe import DataSet

TEMPLATE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
CONTROLLED = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]]).log()
TARGETS, LENGTHS = torch.tensor([1, 2, 0]), [2, 1]


def losses(objective: str, **keys: object) -> torch.Tensor:
    given = DataSet.model_validate({"path": "a", "format": "text", "objective": objective} | keys)
    return make_objective(given).loss(CONTROLLED, TEMPLATE, TARGETS, LENGTHS)


def test_the_shift_acts_at_its_strength():
    """exp(strength * shift) reweighs the template's probabilities."""
    shift = torch.tensor([[0.0, math.log(4), 0.0]])
    probabilities = controlled_log_probs(TEMPLATE[:1], shift, 0.5).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.5, 0.25]]) / 1.25)


def test_cross_entropy_is_the_answers():
    torch.testing.assert_close(losses("cross_entropy"), -torch.tensor([0.5, 0.2, 0.1]).log())


def test_forgetting_is_its_negative_up_to_a_bound():
    torch.testing.assert_close(
        losses("forget", bound=1.7), torch.tensor([math.log(0.5), math.log(0.2), -1.7])
    )


def test_forgetting_without_a_bound_is_the_papers():
    torch.testing.assert_close(losses("forget", bound=None), torch.tensor([0.5, 0.2, 0.1]).log())


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_npo_compares_whole_answers_with_the_templates(beta):
    """-2/beta * log sigmoid(-beta * log(p_controlled / p_template)), of each answer."""
    ratios = [0.5 * 0.2 / (0.25 * 0.8), 0.1 / 0.3]
    expected = [-2 / beta * math.log(1 / (1 + ratio**beta)) for ratio in ratios]
    torch.testing.assert_close(losses("npo", beta=beta), torch.tensor(expected))


@pytest.mark.parametrize(
    "keys", [{"objective": "retain"}, {"objective": "distill", "teacher": {"system_prompt": "x"}}]
)
def test_retaining_and_distilling_are_the_divergence_from_the_reference(keys):
    expected = (TEMPLATE.exp() * (TEMPLATE - CONTROLLED)).sum(dim=1)
    torch.testing.assert_close(losses(**keys), expected)


def test_a_mean_is_over_tokens_and_over_answers_for_npo():
    def units(objective: str) -> int:
        given = DataSet.model_validate({"path": "a", "format": "text", "objective": objective})
        return make_objective(given).units(LENGTHS)

    assert (units("cross_entropy"), units("forget"), units("retain"), units("npo")) == (3, 3, 3, 2)
