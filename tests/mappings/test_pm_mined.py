"""PM-MinED: each target token's nearest control token among its prefixes and extensions."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from trimtab_mappings import match

# few characters, so that random tokens are often prefixes of each other and often at the same distance
CHARACTERS = st.sampled_from([b"a", b"b", b" ", "é".encode(), "中".encode(), b"\xc3", b"\xe4", b"\xb8"])
TOKEN = st.lists(CHARACTERS, max_size=4).map(b"".join)
TOKENS = st.lists(TOKEN, max_size=12)
FALLBACK = st.frozensets(st.integers(min_value=0, max_value=11))


def characters(token):
    try:
        return len(token.decode())
    except UnicodeDecodeError:
        return None


def distance(one, other):
    """The edit distance of two strings one of which is a prefix of the other."""
    if characters(one) is None or characters(other) is None:
        return abs(len(one) - len(other))
    return abs(characters(one) - characters(other))


def row_by_definition(token, is_byte_token, control, byte_tokens):
    """Compare with every control token, as the definition says; slow."""
    same = [i for i, other in enumerate(control) if token and other == token]
    if same:
        return min(same, key=lambda i: ((i in byte_tokens) is not is_byte_token, i in byte_tokens, i))
    twins = {other for i, other in enumerate(control) if i not in byte_tokens}
    candidates = [
        (distance(token, other), i)
        for i, other in enumerate(control)
        if token and other and (token.startswith(other) or other.startswith(token))
        if other != b" " or not token.strip(b" ")
        if i not in byte_tokens or other not in twins
    ]
    return min(candidates)[1] if candidates else -1


def mapping(target, control, *fallback):
    return match([token.encode() for token in target], [token.encode() for token in control], *fallback)[0]


@given(target=TOKENS, control=TOKENS, target_bytes=FALLBACK, control_bytes=FALLBACK)
@example(target=[b""], control=[b""], target_bytes=frozenset(), control_bytes=frozenset())
@example(target=[], control=[], target_bytes=frozenset(), control_bytes=frozenset())
def test_it_agrees_with_the_definition(target, control, target_bytes, control_bytes):
    target_bytes = {i for i in target_bytes if i < len(target) and len(target[i]) == 1}
    control_bytes = {i for i in control_bytes if i < len(control) and len(control[i]) == 1}
    found, exact = match(target, control, target_bytes, control_bytes)
    expected = [
        row_by_definition(token, i in target_bytes, control, control_bytes) for i, token in enumerate(target)
    ]
    assert found.tolist() == expected
    assert exact.tolist() == [bool(token) and token in control for token in target]


def test_the_arrays_have_a_row_for_each_target_token():
    found, exact = match([b"a", b"", b"b"], [b"b"])
    assert (found.dtype, found.shape, exact.dtype, exact.shape) == (np.int32, (3,), np.bool_, (3,))


def test_a_token_that_the_control_has_maps_to_itself():
    found, exact = match([b"the", b"cat"], [b"cat", b"th", b"the"])
    assert found.tolist() == [2, 0]
    assert exact.tolist() == [True, True]


def test_of_prefixes_the_longest_is_the_nearest():
    assert mapping(["Sure"], ["S", "Sur", "Su"]).tolist() == [1]


def test_of_extensions_the_shortest_is_the_nearest():
    assert mapping(["Su"], ["Surely", "Sure"]).tolist() == [1]


def test_the_nearer_of_prefix_and_extension_is_taken():
    assert mapping(["abcd"], ["ab", "abcde"]).tolist() == [1]
    assert mapping(["abcd"], ["abc", "abcdef"]).tolist() == [0]


def test_at_the_same_distance_the_first_id_is_taken_whether_prefix_or_extension():
    assert mapping(["abc"], ["abcx", "ab", "abcd"]).tolist() == [0]
    assert mapping(["abc"], ["ab", "abcx"]).tolist() == [0]


def test_distance_is_counted_in_characters():
    assert mapping(["ab"], ["abcd", "ab中"]).tolist() == [1]


def test_distance_is_counted_in_bytes_where_a_side_is_cut_inside_a_character():
    snow = "☃".encode()
    found, _ = match([b"a" + snow], [b"a" + snow + b"xyz", b"a" + snow[:1]])
    assert found.tolist() == [1]  # two bytes are fewer than three characters
    found, _ = match([b"a" + snow], [b"a" + snow[:1], b"a"])
    assert found.tolist() == [1]  # one character is fewer than two bytes
    found, _ = match([snow[:2]], [snow + b"x", snow[:1]])
    assert found.tolist() == [1]


def test_a_bare_space_stands_only_for_spaces():
    assert mapping([" cat", "   ", " \n"], [" "]).tolist() == [-1, 0, -1]


def test_strings_of_which_neither_begins_the_other_are_never_matched():
    assert mapping(["cat"], ["dog", "at", "car"]).tolist() == [-1]


def test_empty_tokens_match_nothing():
    assert mapping(["", "a"], ["", "b"]).tolist() == [-1, -1]


def test_a_letter_maps_to_a_letter_though_a_byte_token_with_its_bytes_comes_first():
    control = ["a", "b", "a"]
    assert mapping(["a", "ax"], control, (), {0, 1}).tolist() == [2, 2]


def test_a_byte_token_maps_to_a_byte_token_and_to_a_letter_where_there_is_none():
    assert mapping(["a", "b"], ["a", "a", "b"], {0, 1}, {1}).tolist() == [1, 2]
    assert mapping(["a"], ["a", "a"], {0}, {0, 1}).tolist() == [0]
