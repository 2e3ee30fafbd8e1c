"""The trie of spellings, held against its definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from trimtab_mappings import MappingTable, TableError, build_table
from trimtab_mappings.trie import ROOT, Trie, build_trie, trie_fault

spellings = st.dictionaries(
    st.integers(0, 200), st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=60
)


def passing(spelled, node):
    """The tokens whose spelling begins as the node's."""
    return {token for token, pieces in spelled.items() if tuple(pieces[: len(node)]) == node}


def nodes_by_definition(spelled):
    """Each partial spelling at which tokens part, and with how many different pieces they go on."""
    found = {}
    for pieces in spelled.values():
        for node in (tuple(pieces[:length]) for length in range(1, len(pieces))):
            rests = {tuple(spelled[token][len(node) : len(node) + 1]) for token in passing(spelled, node)}
            if len(rests) > 1:
                found[node] = len(rests - {()})
    return found


@given(spelled=spellings)
def test_its_nodes_are_where_spellings_part(spelled):
    trie = build_trie(spelled)
    assert {*trie.tokens.tolist()} == {*spelled}
    assert all(column.dtype == np.int32 for column in trie)
    found, places = {}, []
    for start, end, depth, parent, children in zip(*(column.tolist() for column in trie[1:]), strict=True):
        tokens = trie.tokens[start:end].tolist()
        node = tuple(spelled[tokens[0]][:depth])
        assert {*tokens} == passing(spelled, node)
        assert len(tokens) == end - start
        found[node] = children
        above = [place for place in places if node[: len(place)] == place]
        assert (ROOT if not above else places.index(max(above, key=len))) == parent
        places.append(node)
    assert found == nodes_by_definition(spelled)
    lengths = np.array([len(spelled.get(token, ())) for token in range(201)])
    assert trie_fault(trie, lengths) is None


@pytest.fixture(scope="module")
def table():
    return build_table(hand_made.target(), hand_made.control())


def test_a_table_has_the_trie_of_what_can_be_spelled_and_keeps_it_in_its_file(table, tmp_path):
    """Not the special token, nor bytes that the control can't spell."""
    path = tmp_path / "table.safetensors"
    table.save(path)
    loaded = MappingTable.load(path)
    for column, kept in zip(table.trie, loaded.trie, strict=True):
        np.testing.assert_array_equal(kept, column, strict=True)
    tokens = {table.target_tokens[token] for token in table.trie.tokens}
    assert tokens == {bytes([byte]) for byte in b"Sureta"} | {b"Su", b"re", b"Sure", b"te", b"tea"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tokens": [0, 99]}, "trie_tokens names tokens without a spelling"),
        ({"tokens": [0, -1]}, "trie_tokens names tokens without a spelling"),
        ({"tokens": [6, 7]}, "trie_tokens names tokens without a spelling"),
        ({"depths": []}, "the columns of the trie's nodes are of different lengths"),
        ({"starts": [-1, 0, 0]}, "the trie's nodes are not nodes of its tokens"),
        ({"ends": [99, 99, 99]}, "the trie's nodes are not nodes of its tokens"),
        ({"parents": [0, 0, 0]}, "the trie's nodes are not nodes of its tokens"),
        ({"parents": [-2, 0, 0]}, "the trie's nodes are not nodes of its tokens"),
        ({"children": [0, 1, 1]}, "the trie's nodes are not nodes of its tokens"),
        ({"children": [9, 9, 9]}, "the trie's nodes are not nodes of its tokens"),
        ({"depths": [0, 1, 1]}, "the trie's nodes are not deeper than those above them"),
        (
            {"depths": [2, 1, 1], "parents": [-1, 0, 0]},
            "the trie's nodes are not deeper than those above them",
        ),
        ({"depths": [9, 9, 9]}, "the trie's nodes are deeper than the spellings that pass them"),
    ],
)
def test_a_trie_that_would_lead_out_of_the_arrays_is_refused(table, tmp_path, changes, fault):
    """A checksum does not make sense of what was written with one."""
    path = tmp_path / "table.safetensors"
    columns = {name: np.array(values, np.int32) for name, values in changes.items()}
    trie = Trie(**{**table.trie._asdict(), **columns})
    dataclasses.replace(table, trie=trie).save(path)
    with pytest.raises(TableError, match=fault):
        MappingTable.load(path)
