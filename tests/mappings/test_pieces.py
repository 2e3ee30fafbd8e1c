"""The trie of a control's tokens as its target spells them."""

from __future__ import annotations

import numpy as np
import pytest

import hand_made
from trimtab_mappings import MappingTable, build_table
from trimtab_mappings.pieces import LEAF, PieceTrie, build_pieces, pieces_fault
from trimtab_mappings.trie import ROOT

LETTERS = hand_made.encoder([*"dont'"])
WORDS = hand_made.encoder([*"dont'", "do", "don", "'t"], [("d", "o"), ("do", "n"), ("'", "t")])


@pytest.fixture(scope="module")
def trie() -> PieceTrie:
    return build_pieces(LETTERS, WORDS)


def below(trie: PieceTrie, node: int) -> list[bytes]:
    tokens = WORDS.vocabulary.tokens
    return [tokens[entry] for entry in trie.entries[trie.starts[node] : trie.ends[node]]]


def node_of(trie: PieceTrie, text: str) -> int:
    node = ROOT
    for letter in text:
        node = trie.children()[node, LETTERS.vocabulary.ids[letter.encode()]]
    return node


def test_below_each_beginning_are_the_tokens_that_go_through_it_its_own_first(trie):
    assert below(trie, node_of(trie, "d")) == [b"d", b"do", b"don"]
    assert below(trie, node_of(trie, "do")) == [b"do", b"don"]
    assert below(trie, node_of(trie, "'")) == [b"'", b"'t"]
    assert node_of(trie, "don") == node_of(trie, "'t") == LEAF


def test_tokens_of_lower_ids_weigh_more(trie):
    weights = dict(zip(trie.entries.tolist(), trie.weights.tolist(), strict=True))
    assert [weights[i] for i in sorted(weights)] == sorted(weights.values(), reverse=True)


def test_a_vocabulary_beside_itself_has_no_pieces():
    assert [len(column) for column in build_pieces(WORDS, WORDS)] == [0] * len(PieceTrie._fields)


def test_a_table_keeps_them(tmp_path):
    built = build_table(LETTERS, WORDS)
    built.save(tmp_path / "table.safetensors")
    loaded = MappingTable.load(tmp_path / "table.safetensors").pieces
    for ours, theirs in zip(built.pieces, loaded, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("entries", 99, "pieces_entries has ids from"),
        ("tokens", -1, "pieces_tokens has ids from"),
        ("weights", 0, "pieces_weights are not all positive numbers"),
        ("parents", 5, "are not nodes of their control tokens"),
        ("ends", 99, "are not nodes of their control tokens"),
        ("owned", 2, "are not nodes of their control tokens"),
    ],
)
def test_what_is_wrong_with_a_column_is_said(trie, column, value, said):
    columns = {name: values.copy() for name, values in trie._asdict().items()}
    columns[column][0] = value
    assert said in str(pieces_fault(PieceTrie(**columns), len(LETTERS.vocabulary), len(WORDS.vocabulary)))


def test_columns_of_different_lengths_are_a_fault(trie):
    assert "different lengths" in str(pieces_fault(trie._replace(parents=trie.parents[:-1]), 99, 99))
    assert pieces_fault(trie, len(LETTERS.vocabulary), len(WORDS.vocabulary)) is None
