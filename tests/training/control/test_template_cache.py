"""The template's log-probabilities on disk."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from trimtab_training.control.examples import View
from trimtab_training.control.objectives import controlled_log_probs, divergence
from trimtab_training.control.reference import LiveTemplate
from trimtab_training.control.template_cache import CachedTemplate, model_fingerprint

VOCAB, CPU = 40, torch.device("cpu")
VIEWS = [View((1, 2, i, 3 + i, 4), (3, 4)) for i in range(5, 30)] + [View((7, 8, 9), (1,))]


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny.llama(VOCAB, width=64, layers=1)).eval()


@pytest.fixture
def live() -> LiveTemplate:
    return LiveTemplate(model(0), 0, CPU, VOCAB)


def cached(directory, top_k: int | None = None, fingerprint: str = "one") -> CachedTemplate:
    return CachedTemplate(directory, fingerprint=fingerprint, vocabulary=VOCAB, top_k=top_k, device=CPU)


def test_an_exact_cache_gives_what_the_template_gave(tmp_path, live):
    """In whatever order and company, bit by bit."""
    cache = cached(tmp_path)
    cache.fill(live, VIEWS)
    expected = torch.cat([live.log_probs(VIEWS[start : start + 8]) for start in range(0, len(VIEWS), 8)])
    assert torch.equal(cache.log_probs(VIEWS), expected)
    assert torch.equal(cache.log_probs([VIEWS[-1], VIEWS[3]]), torch.cat([expected[-1:], expected[6:8]]))
    assert cache.kept_mass is None


def test_what_is_on_disk_is_not_computed_again(tmp_path, live):
    assert cached(tmp_path).fill(live, VIEWS) == 1
    again = cached(tmp_path)
    assert again.fill(live, VIEWS) == 0
    assert len(again.log_probs(VIEWS)) == sum(len(view.positions) for view in VIEWS)


@pytest.mark.parametrize("change", [{"fingerprint": "two"}, {"top_k": 5}, {"views": VIEWS[1:]}])
def test_another_model_other_data_or_another_form_is_computed(tmp_path, live, change):
    cached(tmp_path).fill(live, VIEWS)
    views = change.pop("views", VIEWS)
    assert cached(tmp_path, **change).fill(live, views) == 1


def test_a_fingerprint_is_of_the_weights():
    changed = model(0)
    with torch.no_grad():
        changed.lm_head.weight[3, 5] += 1e-6
    assert model_fingerprint(model(0)) == model_fingerprint(model(0))
    assert model_fingerprint(model(0)) != model_fingerprint(changed)
    assert model_fingerprint(model(0)) != model_fingerprint(model(0).to(torch.bfloat16))


def test_top_k_keeps_the_likeliest_tokens_and_the_answer(tmp_path, live):
    """They have their own probabilities, and the others share what is left."""
    cache = cached(tmp_path, top_k=5)
    cache.fill(live, VIEWS)
    exact, kept = live.log_probs(VIEWS), cache.log_probs(VIEWS)
    targets = [token for view in VIEWS for token in view.targets]
    torch.testing.assert_close(kept.logsumexp(dim=1), torch.zeros(len(kept)), atol=1e-5, rtol=0)
    masses = []
    for row, mine, target in zip(exact, kept, targets, strict=True):
        likeliest = {*row.topk(4).indices.tolist(), target}
        likeliest |= {*row.topk(5).indices.tolist()} if len(likeliest) == 4 else set()
        ids = sorted(likeliest)
        torch.testing.assert_close(mine[ids], row[ids])
        masses.append(row[ids].exp().sum().item())
        rest = [token for token in range(VOCAB) if token not in likeliest]
        torch.testing.assert_close(
            mine[rest].exp(), torch.full((35,), (1 - masses[-1]) / 35), atol=1e-6, rtol=1e-4
        )
    assert cache.kept_mass == pytest.approx(sum(masses) / len(masses), abs=1e-5)


def test_a_shift_that_treats_the_bucket_alike_costs_what_it_would_without_the_cache(tmp_path, live):
    view = VIEWS[:1]
    cache = cached(tmp_path, top_k=5)
    cache.fill(live, view)
    exact, kept = live.log_probs(view), cache.log_probs(view)
    shift = torch.zeros_like(exact)
    for row, scores in enumerate(kept):
        (even,) = {value for value in scores.tolist() if scores.tolist().count(value) == 35}
        shift[row, scores != even] = torch.randn(5, generator=torch.Generator().manual_seed(row))
        shift[row, scores == even] = 0.7
    losses = [
        divergence(controlled_log_probs(own, shift, 1.3), own, torch.zeros(2), [2]) for own in (exact, kept)
    ]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)


def test_the_error_of_a_bucket_is_bounded_by_its_mass_and_the_range_of_the_shift(tmp_path, live):
    """KL = log E[exp(s)] - E[s]: only the bucket's part of each mean differs, by at most its range."""
    cache = cached(tmp_path, top_k=20)
    cache.fill(live, VIEWS)
    exact, kept = live.log_probs(VIEWS), cache.log_probs(VIEWS)
    shift = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    own, bucket = (
        divergence(controlled_log_probs(x, shift, 1.0), x, torch.zeros(1), [1]) for x in (exact, kept)
    )
    for row in range(len(exact)):
        outside = ~torch.isclose(exact[row], kept[row], atol=1e-6)
        mass = exact[row][outside].exp().sum()
        inside = (exact[row] + shift[row])[~outside].exp().sum()
        low, high = shift[row][outside].min(), shift[row][outside].max()
        bound = math.log((inside + mass * high.exp()) / (inside + mass * low.exp())) + mass * (high - low)
        assert abs(own[row] - bucket[row]) <= bound + 1e-5
    assert (own - bucket).abs().max() > 1e-3
