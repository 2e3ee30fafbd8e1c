"""What is said of a table is what is in it."""

from __future__ import annotations

import numpy as np
import pytest

import hand_made
from trimtab_mappings import Kind, TableError, build_table
from trimtab_mappings.inspection import Part, Pieces, Token, compare, count_tokens, look_up, summarize


@pytest.fixture(scope="module")
def target():
    return hand_made.target()


@pytest.fixture(scope="module")
def control():
    return hand_made.control()


@pytest.fixture(scope="module")
def table(target, control):
    return build_table(target, control)


def row(table, token):
    (found,) = look_up(table, token)
    return found.row


def test_every_kind_of_row_is_told(table):
    kinds = {name: row(table, name).kind for name in ("S", "Su", "Sure", "tea", "q")}
    assert kinds == {
        "S": Kind.EXACT,
        "Su": Kind.PREFIX,  # `S`, before `Sur`, which is as near
        "Sure": Kind.PREFIX,
        "tea": Kind.PREFIX,
        "q": Kind.NONE,
    }
    assert row(table, f"#{len(table.mapping) - 1}").kind is Kind.ROLE


def test_a_row_names_its_control_token_and_their_distance(table):
    found = row(table, "Sure")
    assert found.control.bytes == b"Sur"
    assert found.distance == 1
    assert row(table, "S").distance == 0


def test_the_distance_of_a_text_without_a_counterpart_is_its_length(table):
    assert (row(table, "q").control, row(table, "q").distance) == (None, 1)


def test_a_summary_counts_every_row_once(table):
    summary = summarize(table)
    assert sum(summary.coverage) == summary.target_tokens == len(table.mapping)
    assert summary.coverage.role == 1
    assert sum(summary.distances.values()) == summary.coverage.prefix + summary.coverage.extension
    assert summary.uses is None


def test_the_worst_rows_come_first_and_exact_ones_never(table):
    worst = summarize(table).worst
    distances = [found.distance for found in worst]
    assert distances == sorted(distances, reverse=True)
    assert {found.kind for found in worst}.isdisjoint({Kind.EXACT, Kind.ROLE})
    assert len(summarize(table, worst=2).worst) == 2


def test_uses_are_counted_in_each_side_s_own_tokens(table, target, control):
    uses, control_uses = count_tokens(table, target, control, ["Suretea", "tea", "q"])
    named = {token: int(uses[row(table, token).target.id]) for token in ("Sure", "tea", "q", "S")}
    assert named == {"Sure": 1, "tea": 2, "q": 1, "S": 0}
    assert uses.sum() == 4
    ids = control.vocabulary.ids
    assert {token: int(control_uses[ids[token]]) for token in (b"S", b"ure", b"te", b"a")} == {
        b"S": 1,
        b"ure": 1,
        b"te": 2,
        b"a": 2,
    }
    assert control_uses.sum() == 6


def test_with_uses_rows_weigh_as_often_as_they_occur(table, target, control):
    uses = count_tokens(table, target, control, ["teateateaSure"])
    summary = summarize(table, uses)
    assert summary.uses._asdict() == {"exact": 0, "prefix": 4, "extension": 0, "role": 0, "none": 0}
    assert summary.distance_uses == {1: 4}
    assert [(found.target.bytes, found.uses) for found in summary.worst] == [(b"tea", 3), (b"Sure", 1)]


def test_without_texts_nothing_is_used(table, target, control):
    uses = count_tokens(table, target, control, [])
    assert [side.tolist() for side in uses] == [[0] * len(table.mapping), [0] * len(table.control_tokens)]
    assert not summarize(table, uses).coarser


def test_uses_of_another_tokenizer_are_refused(table, target, control):
    with pytest.raises(TableError, match="its target is 'the-target'"):
        count_tokens(table, control, control, ["a"])
    with pytest.raises(TableError, match="its control is 'the-control'"):
        count_tokens(table, target, target, ["a"])


def test_tokens_of_either_side_that_the_other_has_not_whole_are_counted(table, target, control):
    summary = summarize(table)
    # m, ur, ure, Sur, teams; and Su, re, Sure, tea, q and two bytes
    assert summary.control_in_pieces == Pieces(tokens=Part(5, 12), uses=None)
    assert summary.target_in_pieces == Pieces(tokens=Part(7, 14), uses=None)
    # the control says S, ure, te, a and te, a; the target Sure, tea and tea
    summary = summarize(table, count_tokens(table, target, control, ["Suretea", "tea"]))
    assert summary.control_in_pieces == Pieces(tokens=Part(5, 12), uses=Part(1, 6))
    assert summary.target_in_pieces == Pieces(tokens=Part(7, 14), uses=Part(3, 3))


def test_a_vocabulary_has_all_its_own_tokens_whole(any_family):
    summary = summarize(build_table(any_family.encoder, any_family.encoder))
    assert summary.control_in_pieces.tokens.part == summary.target_in_pieces.tokens.part == 0
    assert not summary.coarser


def test_words_that_the_control_spells_from_a_bare_space_on_are_counted():
    spaces = [("\u0120", "a"), ("\u0120", "\u0120")]
    target = hand_made.encoder(["\u0120", "a", "b", "\u0120a", "\u0120\u0120"], spaces)
    control = hand_made.encoder(["\u0120", "a"])
    table = build_table(target, control)
    assert table.from_bare_space.tolist() == [False, False, False, True, False]  # and spaces are no word
    assert summarize(table).from_bare_space == Pieces(tokens=Part(1, 5), uses=None)
    uses = count_tokens(table, target, control, ["a a aa"])
    assert summarize(table, uses).from_bare_space == Pieces(tokens=Part(1, 5), uses=Part(2, 4))


def test_a_control_is_coarser_where_the_target_spells_most_of_its_tokens_in_pieces():
    fine, coarse = hand_made.letters(), hand_made.words()
    assert summarize(build_table(fine, coarse)).control_in_pieces.tokens == Part(8, 15)
    assert summarize(build_table(fine, coarse)).coarser
    assert not summarize(build_table(coarse, fine)).coarser


def test_with_a_text_a_control_is_coarser_where_its_uses_are_in_pieces():
    fine, coarse = hand_made.letters(), hand_made.words()
    table = build_table(fine, coarse)
    pieces = {
        share: summarize(table, count_tokens(table, fine, coarse, ["Sure" + "o" * rest]))
        for share, rest in {"1 of 20": 19, "1 of 19": 18}.items()
    }
    assert {share: summary.coarser for share, summary in pieces.items()} == {
        "1 of 20": False,
        "1 of 19": True,
    }
    assert pieces["1 of 19"].control_in_pieces == Pieces(tokens=Part(8, 15), uses=Part(1, 19))
    converse = build_table(coarse, fine)
    assert not summarize(converse, count_tokens(converse, coarse, fine, ["Sure"])).coarser


def test_a_lookup_names_the_segment_and_the_neighbours_nearest_first(table, control):
    (found,) = look_up(table, "Su")
    assert b"".join(token.bytes for token in found.segment) == b"Su"
    ids = control.vocabulary.ids
    near = [(neighbour.token, neighbour.kind, neighbour.distance) for neighbour in found.near]
    assert near == [
        (Token(ids[b"S"], b"S"), Kind.PREFIX, 1),
        (Token(ids[b"Sur"], b"Sur"), Kind.EXTENSION, 1),
    ]
    assert look_up(table, "Su", near=1)[0].near == found.near[:1]


def test_the_nearest_neighbour_of_an_approximate_row_is_what_it_maps_to(gpt2_like, llama_like):
    table = build_table(llama_like.encoder, gpt2_like.encoder)
    approximate = np.flatnonzero((table.kinds == Kind.PREFIX) | (table.kinds == Kind.EXTENSION))
    assert len(approximate)
    for token_id in approximate.tolist():
        (found,) = look_up(table, f"#{token_id}")
        candidates = [
            n for n in found.near if n.token.bytes != b" " or not found.row.target.bytes.strip(b" ")
        ]
        assert candidates[0].token == found.row.control


def test_a_token_is_named_by_its_text_its_id_or_its_bytes(table, target):
    token_id = target.vocabulary.ids["ä".encode("latin-1")]
    assert row(table, "<E4>").target == row(table, f"#{token_id}").target == Token(token_id, b"\xe4")


def test_a_special_token_is_named_as_it_is_written(table, control):
    found = row(table, "</s>")
    assert (found.kind, found.target.name) == (Kind.ROLE, "</s>")
    assert found.control == Token(control.vocabulary.roles["eos"][0], b"", "</s>")


def test_bytes_that_are_no_text_are_refused_without_a_suggestion(table):
    with pytest.raises(KeyError) as refused:
        look_up(table, "\udcff")
    assert refused.value.args[0].startswith("no token '\\udcff' among the 15 of the-target; name a token by")


def test_all_tokens_of_the_same_bytes_are_found(gpt2_like, llama_like):
    table = build_table(llama_like.encoder, gpt2_like.encoder)
    twins = [i for i, token in enumerate(llama_like.vocabulary.tokens) if token == b"t"]
    assert [found.row.target.id for found in look_up(table, "t")] == twins
    assert len(twins) == 2


@pytest.mark.parametrize("token", ["Sxre", "", "<FF>", "#15", "#99999999999999999999"])
def test_a_token_that_there_is_not_is_named(table, token):
    with pytest.raises(KeyError, match=f"no token .*{token}.* the-target"):
        look_up(table, token)


def test_a_token_with_another_space_is_suggested(gpt2_like, llama_like):
    table = build_table(gpt2_like.encoder, llama_like.encoder)
    assert b" tabs" in gpt2_like.vocabulary.ids
    assert b"tabs" not in gpt2_like.vocabulary.ids
    with pytest.raises(KeyError, match="did you mean ' tabs'"):
        look_up(table, "tabs")


def test_a_table_does_not_differ_from_itself(table):
    difference = compare(table, table)
    assert (difference.changes, difference.kinds, difference.segments) == ([], {}, 0)


def test_a_difference_names_each_row_that_changed(target, control, table):
    exact = build_table(target, control, "exact")
    difference = compare(exact, table)
    assert difference.rows == len(table.mapping)
    assert difference.kinds == {"none to prefix": table.coverage.prefix}
    assert all(change.before.control is None and change.after.control for change in difference.changes)
    assert difference.segments == 0


def test_tables_of_different_controls_are_compared_by_bytes(target, control, table):
    tokens = [token.decode("latin-1") for token in control.vocabulary.tokens[1:]]
    merges = [("u", "r"), ("ur", "e"), ("t", "e")]
    renumbered = hand_made.encoder([*reversed(tokens), "</s>"], merges)
    other = build_table(target, renumbered)
    assert (other.mapping != table.mapping).any()
    # where two control tokens are as near, the one with the lower id is taken
    assert [change.before.target.bytes for change in compare(table, other).changes] == [b"Su"]


def test_tables_of_different_targets_are_not_compared(table, target, control):
    other = build_table(control, target)
    with pytest.raises(TableError, match="only tables of one target can be compared"):
        compare(table, other)
