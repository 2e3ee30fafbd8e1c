"""PM-MinED: each target token's nearest control token among its prefixes and extensions."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, build_table, nearest, read_vocabulary

SNOW = "☃".encode()
# few characters, so that random tokens are often prefixes of each other and often at the same distance
CHARACTERS = st.sampled_from([b"a", b"b", b" ", "é".encode(), "中".encode(), b"\xc3", b"\xe4", b"\xb8"])
TOKEN = st.lists(CHARACTERS, min_size=1, max_size=4).map(b"".join)
IDS = st.integers(min_value=0, max_value=99)
# the same for tokens as SentencePiece spells them, where bytes have tokens of their own; "" for an unused id
SPELLED = st.one_of(
    st.text(st.sampled_from("ab▁ é中"), max_size=4),
    st.sampled_from([f"<0x{byte:02X}>" for byte in b"ab \xc3\xa9\xe4\xb8"]),
)
SPELLINGS = st.lists(SPELLED, max_size=12, unique_by=lambda spelling: spelling or object())


def distance(one, other):
    try:
        return Levenshtein.distance(one.decode(), other.decode())
    except UnicodeDecodeError:
        return Levenshtein.distance(one, other)


def fits(token, other):
    either = token.startswith(other) or other.startswith(token)
    return either and (other != b" " or not token.strip(b" "))


def by_definition(token, control):
    """Compare with every control token; slow."""
    found = [(distance(token, other), i) for other, i in control.items() if fits(token, other)]
    return min(found)[1] if found else None


def row_by_definition(token, is_byte_token, control):
    """The row of a table, of a control with byte tokens; slow."""
    tokens, byte_tokens, said = control.tokens, control.byte_fallback, control.said

    def best(spelled, is_byte_token):
        """Of tokens with the same bytes: text or a byte as the target's is; text; what the tokenizer says."""
        return min(
            (i for i, other in enumerate(tokens) if other == spelled),
            key=lambda i: ((i in byte_tokens) is not is_byte_token, i in byte_tokens, i not in said, i),
        )

    if token and token in tokens:
        return best(token, is_byte_token)
    others = {other for other in tokens if token and other and fits(token, other)}
    return min(((distance(token, other), best(other, False)) for other in others), default=(0, -1))[1]


def with_fallback(spellings):
    """An encoder of exactly these tokens."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(spellings) if token}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer))


def found(tokens, *control):
    """What is nearest to each of `tokens`, of control tokens that are numbered in their order."""
    nearest_ids = nearest(tokens, {token: i for i, token in enumerate(control)})
    return {token: control[i] for token, i in nearest_ids.items()}


@settings(max_examples=500)
@given(tokens=st.frozensets(TOKEN), control=st.dictionaries(TOKEN, IDS))
@example(tokens=frozenset(), control={})
def test_the_nearest_is_the_least_by_edit_distance_and_id_of_all_pairs(tokens, control):
    missing = tokens - control.keys()
    expected = {token: by_definition(token, control) for token in missing}
    assert nearest(missing, control) == {token: i for token, i in expected.items() if i is not None}


@settings(max_examples=500)
@given(target=SPELLINGS, control=SPELLINGS)
@example(target=["", "<0x61>", "a"], control=["<0x61>", "", "a", "a▁", "a "])
@example(target=["<0x61>"], control=["a", "b"])
@example(target=["", ""], control=[])
@example(target=[" ", "  "], control=["▁", " "])
def test_every_row_agrees_with_the_definition(target, control):
    encoder, control = with_fallback(target), with_fallback(control)
    target, table = encoder.vocabulary, build_table(encoder, control)
    assert table.mapping.tolist() == [
        row_by_definition(token, i in target.byte_fallback, control.vocabulary)
        for i, token in enumerate(target.tokens)
    ]
    known = {*control.vocabulary.tokens} - {b""}
    assert table.exact.tolist() == [token in known for token in target.tokens]


def test_of_prefixes_the_longest_is_the_nearest():
    assert found([b"Sure"], b"S", b"Sur", b"Su") == {b"Sure": b"Sur"}


def test_of_extensions_the_shortest_is_the_nearest():
    assert found([b"Su"], b"Surely", b"Sure") == {b"Su": b"Sure"}


def test_the_nearer_of_prefix_and_extension_is_taken():
    assert found([b"abcd"], b"ab", b"abcde") == {b"abcd": b"abcde"}
    assert found([b"abcd"], b"abc", b"abcdef") == {b"abcd": b"abc"}


@pytest.mark.parametrize("control", [(b"abcx", b"ab", b"abcd"), (b"ab", b"abcx")])
def test_at_the_same_distance_the_lowest_id_is_taken_whether_prefix_or_extension(control):
    assert found([b"abc"], *control) == {b"abc": control[0]}


def test_the_lowest_id_need_not_come_first():
    assert nearest([b"abc"], {b"abcx": 7, b"ab": 3, b"abcd": 5}) == {b"abc": 3}


def test_distance_is_counted_in_characters():
    assert found([b"ab"], b"abcd", "ab中".encode()) == {b"ab": "ab中".encode()}


@pytest.mark.parametrize(
    ("token", "farther", "nearer"),
    [
        pytest.param(b"a" + SNOW, b"a" + SNOW + b"xyz", b"a" + SNOW[:1], id="two bytes, three characters"),
        pytest.param(b"a" + SNOW, b"a" + SNOW[:1], b"a", id="one character, two bytes"),
        pytest.param(SNOW[:2], SNOW + b"x", SNOW[:1], id="one byte, two bytes"),
    ],
)
def test_distance_is_counted_in_bytes_where_a_side_is_cut_inside_a_character(token, farther, nearer):
    assert found([token], farther, nearer) == {token: nearer}
    assert found([token], nearer, farther) == {token: nearer}


def test_a_bare_space_stands_only_for_spaces():
    assert found([b" cat", b"   ", b" \n"], b" ") == {b"   ": b" "}


def test_strings_of_which_neither_begins_the_other_are_never_matched():
    assert found([b"cat"], b"dog", b"at", b"car") == {}


def test_a_letter_maps_to_a_letter_though_a_byte_token_with_its_bytes_comes_first():
    control = with_fallback(["<0x61>", "<0x62>", "a"])
    table = build_table(with_fallback(["a", "ax"]), control)
    assert table.mapping.tolist() == [2, 2]


def test_a_byte_token_maps_to_a_byte_token_and_to_a_letter_where_there_is_none():
    target = with_fallback(["<0x61>", "<0x62>", "a"])
    table = build_table(target, with_fallback(["a", "<0x61>", "b"]))
    assert table.mapping.tolist() == [1, 2, 0]


def test_an_unused_id_maps_to_nothing_and_nothing_maps_to_it():
    table = build_table(with_fallback(["", "a"]), with_fallback(["", "", "b"]))
    assert table.mapping.tolist() == [-1, -1]
    assert not table.exact.any()
