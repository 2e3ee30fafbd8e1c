"""A strategy chooses the control token of a token that the control does not have, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import hand_made
from trimtab_mappings import STRATEGIES, Kind, build_table, nearest


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


@pytest.fixture(scope="module", params=["byte_level_to_fallback", "fallback_to_word_piece"])
def tables(request, gpt2_like, llama_like, bert_like):
    """A target, a control, and the table of each strategy."""
    sides = {
        "byte_level_to_fallback": (gpt2_like, llama_like),
        "fallback_to_word_piece": (llama_like, bert_like),
    }
    target, control = sides[request.param]
    by_strategy = {name: build_table(target.encoder, control.encoder, name) for name in STRATEGIES}
    return target, control, by_strategy


def test_an_unknown_strategy_is_refused_and_all_are_named(gpt2_like, llama_like):
    with pytest.raises(ValueError, match="no strategy 'best', there are: pm-mined, exact, first-segment"):
        build_table(gpt2_like.encoder, llama_like.encoder, "best")


def test_pm_mined_is_taken_where_none_is_named(gpt2_like, llama_like):
    assert build_table(gpt2_like.encoder, llama_like.encoder).strategy == "pm-mined"


def test_a_table_says_by_which_strategy_it_was_built(gpt2_like, llama_like, strategy):
    assert build_table(gpt2_like.encoder, llama_like.encoder, strategy).strategy == strategy


def test_exact_rows_roles_and_segments_are_the_same_for_all(tables):
    _, _, by_strategy = tables
    first, *others = by_strategy.values()
    settled = np.isin(first.kinds, [Kind.EXACT, Kind.ROLE])
    assert settled.any()
    assert not settled.all()
    for other in others:
        np.testing.assert_array_equal(first.exact, other.exact)
        np.testing.assert_array_equal(first.mapping[settled], other.mapping[settled])
        np.testing.assert_array_equal(first.segment_ids, other.segment_ids)
        np.testing.assert_array_equal(first.segment_offsets, other.segment_offsets)


def test_exact_maps_no_token_that_the_control_does_not_have(tables):
    table = tables[2]["exact"]
    assert {*table.kinds.tolist()} == {Kind.EXACT, Kind.ROLE, Kind.NONE}


def test_pm_mined_maps_to_the_nearest_prefix_or_extension(tables):
    target, control, by_strategy = tables
    table = by_strategy["pm-mined"]
    missing = {token for token in target.vocabulary.tokens if token} - control.vocabulary.ids.keys()
    found = nearest(missing, control.vocabulary.ids)
    rows = {
        token: i for token, i in zip(target.vocabulary.tokens, table.mapping, strict=True) if token in missing
    }
    assert rows == {token: found.get(token, -1) for token in missing}
    assert {Kind.PREFIX, Kind.EXTENSION} <= {*table.kinds.tolist()}


def test_first_segment_maps_to_what_the_control_would_generate_first(tables):
    target, control, by_strategy = tables
    table = by_strategy["first-segment"]
    for token_id in np.flatnonzero(table.kinds == Kind.PREFIX).tolist():
        first, *_ = control.encoder.encode_all([target.vocabulary.tokens[token_id]])[0]
        assert table.mapping[token_id] == first
    assert {*table.kinds.tolist()} <= {Kind.EXACT, Kind.PREFIX, Kind.ROLE, Kind.NONE}


def test_first_segment_never_maps_text_to_the_unknown_token(tables):
    target, control, by_strategy = tables
    table, unknown = by_strategy["first-segment"], control.vocabulary.roles["unk"][0]
    assert [*np.flatnonzero(table.mapping == unknown)] == [*target.vocabulary.roles["unk"]]


def test_first_segment_leaves_a_token_unmapped_that_begins_with_what_the_control_can_not_spell(
    gpt2_like, bert_like
):
    table = build_table(gpt2_like.encoder, bert_like.encoder, "first-segment")
    newline = gpt2_like.vocabulary.ids[b"\n"]
    assert table.segment(newline).tolist() == [*bert_like.vocabulary.roles["unk"]]
    assert table.kinds[newline] == Kind.NONE


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        ("exact", {"te": "te"}),
        ("pm-mined", {"te": "te", "Su": "S", "re": "r", "Sure": "Sur", "tea": "te"}),
        ("first-segment", {"te": "te", "Su": "S", "re": "r", "Sure": "S", "tea": "te"}),
    ],
)
def test_each_strategy_chooses_in_its_own_way_among_the_same_tokens(strategy, rows):
    target, control = hand_made.target(), hand_made.control()
    mapping = build_table(target, control, strategy).mapping
    words = {
        token: i
        for token, i in zip(target.vocabulary.tokens, mapping, strict=True)
        if len(token) > 1 and i >= 0
    }
    tokens = control.vocabulary.tokens
    assert {token.decode(): tokens[i].decode() for token, i in words.items()} == rows


def test_first_segment_takes_no_token_from_behind_what_the_control_can_not_spell():
    control = hand_made.control()  # it has no q, and no unknown token to stand for it
    target = hand_made.encoder([*"qSu", "qS", "Su"], [("q", "S"), ("S", "u")])
    table = build_table(target, control, "first-segment")
    ids = target.vocabulary.ids
    assert (table.mapping[ids[b"qS"]], table.kinds[ids[b"qS"]]) == (-1, Kind.NONE)
    assert table.mapping[ids[b"Su"]] == control.vocabulary.ids[b"S"]


def test_a_control_without_any_token_leaves_everything_unmapped():
    table = build_table(hand_made.target(), hand_made.encoder(["</s>"]))
    assert table.coverage.none == len(table.mapping) - 1
    assert table.coverage.role == 1
