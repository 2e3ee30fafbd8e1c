"""A table's score is how often it names the control's own next token."""

from __future__ import annotations

import pytest

import hand_made
from trimtab_mappings import STRATEGIES, build_table
from trimtab_mappings.scoring import find_meetings, score


@pytest.fixture(scope="module")
def target():
    return hand_made.target()


@pytest.fixture(scope="module")
def control():
    return hand_made.control()


def scored(target, control, texts, strategy):
    return score(build_table(target, control, strategy), find_meetings(target, control, texts))


def slow_meetings(target, control, text):
    """Walk through the text, a token at a time."""
    places = {}
    for side, encoder in (("target", target), ("control", control)):
        place = 0
        for token_id in encoder.encode(text.encode())[0]:
            places.setdefault(place, {})[side] = token_id
            place += len(encoder.vocabulary.tokens[token_id])
    return [(at["target"], at["control"]) for _, at in sorted(places.items()) if len(at) == 2]


def test_meetings_are_where_a_token_of_each_begins(target, control):
    meetings = find_meetings(target, control, ["Suretea"])
    names = [
        (target.vocabulary.tokens[t], control.vocabulary.tokens[c])
        for t, c in zip(meetings.target_ids, meetings.control_ids, strict=True)
    ]
    assert names == [(b"Sure", b"S"), (b"tea", b"te")]
    assert (meetings.target_tokens, meetings.control_tokens, meetings.skipped_bytes) == (2, 4, 0)


def test_meetings_of_real_families_agree_with_a_walk(gpt2_like, any_family):
    text = "The cat sat on the mat, naïve 中文 x=1; y = 3.14"
    text = (
        text
        if any_family.encoder.join(any_family.encoder.encode(text.encode())[0]) == text.encode()
        else "the"
    )
    meetings = find_meetings(gpt2_like.encoder, any_family.encoder, [text])
    assert len(meetings.target_ids)
    pairs = list(zip(meetings.target_ids.tolist(), meetings.control_ids.tolist(), strict=True))
    assert pairs == slow_meetings(gpt2_like.encoder, any_family.encoder, text)


def test_strategies_are_right_where_they_name_the_control_s_token(target, control):
    texts = ["Suretea", "tea"]  # the control goes on with S, te and te
    hits = {name: scored(target, control, texts, name).hits for name in STRATEGIES}
    # PM-MinED maps `Sure` to `Sur`, the longest prefix, which the control's own merges never make
    assert hits == {"pm-mined": 2, "exact": 0, "first-segment": 3}


def test_accuracy_is_weighted_by_how_often_tokens_occur(target, control):
    assert scored(target, control, ["Suretea"], "pm-mined").accuracy == pytest.approx(1 / 2)
    assert scored(target, control, ["Suretea", *["tea"] * 8], "pm-mined").accuracy == pytest.approx(9 / 10)


def test_the_kinds_of_rows_add_up(gpt2_like, llama_like):
    text = "The cat sat on the mat, and the dog didn't. hello world"
    found = scored(llama_like.encoder, gpt2_like.encoder, [text], "pm-mined")
    assert sum(found.places_by_kind) == found.places > 0
    assert sum(found.hits_by_kind) == found.hits
    assert all(hits <= places for hits, places in zip(found.hits_by_kind, found.places_by_kind, strict=True))


def test_a_vocabulary_scores_all_against_itself(any_family):
    found = scored(any_family.encoder, any_family.encoder, ["the cat", "hello world"], "pm-mined")
    assert found.hits == found.places > 0


def test_what_one_side_can_not_spell_is_left_out_line_by_line_and_word_by_word(target, control):
    meetings = find_meetings(target, control, ["tea\nSuretea\nqtea"])
    # the newlines, and `qtea`, whose q the control has not
    assert meetings.skipped_bytes == 2 + 4
    assert meetings.target_tokens == 3


@pytest.mark.parametrize("texts", [[], [""], ["\n"]])
def test_without_a_text_there_is_no_score(target, control, texts):
    found = scored(target, control, texts, "pm-mined")
    assert (found.places, found.hits, found.accuracy) == (0, 0, 0.0)
