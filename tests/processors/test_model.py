"""A control model's ragged batches, against the plain model."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import tiny
from tiny import byte_level, gpt_neox, llama, qwen2, save
from trimtab_processors.cache import BLOCK_SIZE, BlockPool, blocks_for
from trimtab_processors.model import CachedSequence, ControlModel
from trimtab_processors.pack import PackError

CPU = torch.device("cpu")
VOCAB = 300


def mistral(vocab: int) -> MistralConfig:
    """Attention with a sliding window, and fewer heads for keys than for queries."""
    return MistralConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=9,
        max_position_embeddings=tiny.CONTEXT,
        initializer_range=0.15,
    )


@pytest.fixture(scope="module", params=[llama, qwen2, gpt_neox, mistral], ids=lambda make: make.__name__)
def control(request, tmp_path_factory):
    """A directory, and the plain model in it."""
    directory = tmp_path_factory.mktemp("control")
    config = request.param(VOCAB)
    if isinstance(config, MistralConfig):
        torch.manual_seed(0)
        plain = MistralForCausalLM(config).eval()
        plain.save_pretrained(directory)
    else:
        plain = save(directory, byte_level(VOCAB), config)
    return str(directory), plain


@torch.no_grad()
def plain_row(plain, tokens):
    return plain(torch.tensor([tokens])).logits[0, -1]


def test_a_context_that_is_not_finite_reaches_no_other(control):
    """Neither beside it in a batch, where contexts are padded, nor in the blocks that it leaves behind."""
    directory, plain = control
    model = ControlModel(directory, cache_bytes=1, device=CPU)
    model._model.get_input_embeddings().weight[7] = torch.nan
    sick = CachedSequence(tokens=[7] * (3 * BLOCK_SIZE))
    model.run([sick])
    assert not sick.row.isfinite().any()
    long, short = (
        CachedSequence(tokens=[5 + i] * n) for i, n in enumerate((3 * BLOCK_SIZE - 1, BLOCK_SIZE + 1))
    )
    for _ in range(2):  # read in groups of their own, then decoded in one, padded to the longest
        model.run([short, long])
        for sequence in (long, short):
            sequence.change([*sequence.tokens, 8], len(sequence.tokens))
    model.run([short, long])
    for sequence in (short, long, sick):
        model.release(sequence)
    for length in (1, BLOCK_SIZE + 1, 3 * BLOCK_SIZE):
        later = CachedSequence(tokens=[9] * length)
        model.run([later])
        torch.testing.assert_close(later.row, plain_row(plain, later.tokens), atol=1e-4, rtol=1e-4)
        later.change([*later.tokens, 10], length)
        model.run([later])
        torch.testing.assert_close(later.row, plain_row(plain, later.tokens), atol=1e-4, rtol=1e-4)
    for sequence in (short, long):
        torch.testing.assert_close(sequence.row, plain_row(plain, sequence.tokens), atol=1e-4, rtol=1e-4)


def compute(model, plain, sequences):
    """Run what needs it; all rows are those of the plain model."""
    model.run([sequence for sequence in sequences if sequence.needs_row])
    for sequence in sequences:
        torch.testing.assert_close(sequence.row, plain_row(plain, sequence.tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cache_bytes", [1, 10_000_000], ids=["pool-of-one-context", "pool-with-room"])
def test_every_row_of_a_changing_batch_is_that_of_the_plain_model(control, cache_bytes):
    """Sequences grow, are rolled back, join and leave; a full pool only costs time."""
    directory, plain = control
    model = ControlModel(directory, cache_bytes=cache_bytes, device=CPU)
    rng = random.Random(0)
    live: list[CachedSequence] = []
    for _ in range(25):
        if len(live) < 6 and rng.random() < 0.5:
            live.append(CachedSequence())
        if live and rng.random() < 0.2:
            model.release(live.pop(rng.randrange(len(live))))
        for sequence in live:
            said = sequence.tokens[: sequence._said]
            kept = rng.randint(max(0, len(said) - 3), len(said))
            highest = rng.choice([3, VOCAB])  # low ones are often what was looked ahead at
            fresh = [rng.randrange(highest) for _ in range(rng.choice([1, 1, 1, 2, 40]))]
            tokens = (said[:kept] + fresh)[: tiny.CONTEXT]
            sequence.change(tokens, min(kept, len(tokens)))
        compute(model, plain, live)
        looking = [s for s in live if len(s.tokens) + 3 <= tiny.CONTEXT and rng.random() < 0.5]
        for _ in range(rng.choice([1, 2])):
            for sequence in looking:
                sequence.go_on([rng.randrange(3) for _ in range(rng.choice([1, 3]))])
            compute(model, plain, looking)
    assert model.pool.used <= model.pool.blocks
    for sequence in live:
        model.release(sequence)
    assert model.pool.used == 0


def test_a_context_that_only_gets_shorter_gets_the_row_of_its_new_end(control):
    """What was computed past the new end does not count, and nothing before it is computed again."""
    directory, plain = control
    model = ControlModel(directory, cache_bytes=10_000_000, device=CPU)
    tokens, sequence = list(range(20)), CachedSequence()
    sequence.change(tokens, 0)
    model.run([sequence])
    del tokens[12:]
    assert sequence.change(tokens, 12) == 8
    assert sequence.new_tokens == 1
    model.run([sequence])
    torch.testing.assert_close(sequence.row, plain_row(plain, tokens), atol=2e-4, rtol=1e-4)


def test_a_path_that_is_then_said_is_not_computed_again(control):
    """As far as it is said; what is not said counts as nothing lost."""
    directory, plain = control
    model = ControlModel(directory, cache_bytes=10_000_000, device=CPU)
    tokens, sequence = list(range(20)), CachedSequence()
    for said, computed in (([], 20), ([5, 6], 0), ([5], 1), ([5, 7], 1), ([9], 1)):
        lost = sequence.change([*tokens, *said], len(tokens) if sequence.tokens else 0)
        tokens = [*tokens, *said]
        assert (lost, sequence.new_tokens if sequence.needs_row else 0) == (0, computed)
        compute(model, plain, [sequence])
        for path in ([8], [5, 6]):
            sequence.go_on(path)
            assert sequence.new_tokens == len(path)
            compute(model, plain, [sequence])
    assert sequence.change(tokens[:-1], len(tokens) - 1) == 1
    compute(model, plain, [sequence])


def test_what_a_new_spelling_replaces_is_computed_anew_though_it_goes_on_as_expected(control):
    """A path keeps only what stands behind the very tokens that it was put behind."""
    directory, plain = control
    model = ControlModel(directory, cache_bytes=10_000_000, device=CPU)
    sequence = CachedSequence(tokens=[1, 2, 3])
    compute(model, plain, [sequence])
    sequence.go_on([5])
    compute(model, plain, [sequence])
    assert sequence.change([1, 2, 5, 7], 2) == 1
    assert sequence.cached == 2
    compute(model, plain, [sequence])


def test_an_unchanged_context_needs_no_row():
    """A half-prefilled request waits for its target; its control computes once."""
    sequence = CachedSequence()
    sequence.change([1, 2], 0)
    assert sequence.needs_row
    sequence.complete(torch.zeros(3))
    assert sequence.change([1, 2], 2) == 0
    assert not sequence.needs_row


def test_a_directory_without_a_model_is_refused_by_name(tmp_path):
    """The message says which."""
    with pytest.raises(PackError, match=str(tmp_path)):
        ControlModel(str(tmp_path), cache_bytes=1, device=CPU)


def test_blocks_are_taken_and_given_back():
    """A pool hands out every block once."""
    pool = BlockPool(4)
    first, second = pool.take(3), pool.take(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.free, pool.used, pool.take(0)) == (0, 4, [])
    pool.give(first)
    assert pool.free == 3
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]


def test_a_long_context_does_not_make_short_ones_attend_to_as_much(tmp_path):
    """Contexts of like length are attended together, so that more than half of it is no padding."""
    save(tmp_path, byte_level(VOCAB), llama(VOCAB))
    model = ControlModel(str(tmp_path), cache_bytes=10_000_000, device=CPU)
    lengths = [3, 17, 20, 40, 60, 64, 200, 250]
    sequences = [CachedSequence(tokens=[1] * length) for length in lengths]
    model.run(sequences)
    for sequence in sequences:
        sequence.change([*sequence.tokens, 2], len(sequence.tokens))
    (wave,) = model._waves(sequences)
    step, *_ = model._layout(wave)
    assert 1 < len(step.groups) < len(sequences)
    for group in step.groups:
        own = BLOCK_SIZE * (group.positions[:, -1] // BLOCK_SIZE + 1)
        assert bool((group.slots.shape[1] < 2 * own).all())
