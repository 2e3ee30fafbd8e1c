"""The tokens of a target as the tokens of a control's context."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference import Model, Reference, unfinished
from trimtab_mappings import build_table, load_encoder
from trimtab_processors.alignment import (
    Aligner,
    Alignment,
    common_prefix,
    dropped_tokens,
    incomplete_tail,
)

PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PROMPT = [1, 5, 9]


@pytest.fixture(scope="module", params=["a", "b", "c"])
def pair(request, family):
    """One target of the family: its aligner, and the slow reference."""
    directory = family.targets[request.param]
    target = load_encoder(str(directory))
    encoder = load_encoder(str(family.control))
    reference = Reference(Model(directory), Model(family.control))
    return Aligner(target.vocabulary, encoder, build_table(target, encoder)), reference


def tokens_of(aligner):
    return st.lists(st.integers(0, len(aligner.mapping) + 3), max_size=24)


@PROPERTY
@given(data=st.data())
def test_every_step_leaves_the_context_that_the_reference_builds_from_scratch(pair, data):
    """However many tokens a step brings, and whatever their bytes."""
    aligner, reference = pair
    generated = data.draw(tokens_of(aligner))
    contexts = list(reference.contexts(generated))
    alignment, done = Alignment(aligner, PROMPT), 0
    while done < len(generated):
        count = data.draw(st.integers(1, 3))
        before = list(alignment.tokens)
        kept = alignment.extend(generated[done : done + count])
        done = min(done + count, len(generated))
        assert alignment.tokens == PROMPT + contexts[done]
        assert alignment.tokens[:kept] == before[:kept]


@PROPERTY
@given(data=st.data())
def test_the_controls_text_is_the_targets_text_but_for_an_unfinished_character(pair, data):
    """Never a replacement character, never a byte lost or doubled."""
    aligner, _ = pair
    generated = data.draw(tokens_of(aligner))
    alignment = Alignment(aligner, PROMPT)
    alignment.extend(generated)
    control = aligner.encoder.vocabulary
    text = b"".join(control.tokens[token] for token in alignment.tokens[len(PROMPT) :])
    whole = aligner.text(generated)
    assert text == whole[: len(whole) - alignment.waiting]
    assert alignment.waiting <= 3


def test_a_character_in_pieces_waits_for_its_last_byte(pair):
    """Where the target spells bytes that the control has no token for, in the piece in which they come."""
    aligner, _ = pair
    smile = "🙂".encode()
    pieces = [i for i, data in enumerate(aligner.target.tokens) if data and data == smile[:1]]
    if not pieces:
        pytest.skip("this target has no tokens for single bytes")
    alignment = Alignment(aligner, [])
    rest = [aligner.target.tokens.index(smile[i : i + 1]) for i in range(1, 4)]
    alignment.extend([*pieces, *rest])
    assert b"".join(aligner.encoder.vocabulary.tokens[t] for t in alignment.tokens) == smile


@given(st.binary(max_size=8))
def test_the_unfinished_end_of_any_bytes_is_what_the_reference_says(data):
    """Between 0 and 3 bytes that begin a character."""
    assert incomplete_tail(data) == len(unfinished(data))


def test_the_common_prefix_of_two_lists_is_counted():
    """Also where one of them ends."""
    assert [common_prefix(a, b) for a, b in [([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3])]] == [0, 1, 2]


@given(st.integers(0, 5000), st.integers(2, 300))
def test_a_window_is_never_outgrown_and_moves_in_strides_of_its_half(length, limit):
    """So that a context past the window is computed anew only once in half a window."""
    kept = length - dropped_tokens(length, limit)
    assert kept <= limit
    assert kept == length or kept > limit - max(limit // 2, 1) - 1
    assert dropped_tokens(length, limit) % max(limit // 2, 1) == 0
