"""Positions that are comparable across tokenizers."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from trimtab_mappings import Vocabulary
from trimtab_training.recipe_file import RecipeError
from trimtab_training.similarity.positions import (
    Passage,
    Position,
    common_positions,
    load_passages,
    sample,
    token_ends,
)
from trimtab_training.similarity.recipe import ComparedModel, SimilarityRecipe
from trimtab_training.similarity.shifts import Reader

MODELS = [{"name": name, "base": "x", "tuned": "y", "task": "t"} for name in ("one", "two")]
TOKENS = (b"", b"a", b"\xe8", b"\xaa\x9e", b"ab")
START = 0


@pytest.fixture
def vocabulary():
    return Vocabulary("v", TOKENS, frozenset({START}), {}, dummy_prefix=False, fingerprint="")


def recipe(tmp_path, **keys) -> SimilarityRecipe:
    return SimilarityRecipe.model_validate({"models": MODELS, "output_dir": tmp_path / "out", **keys})


def prefixes(tokenizer, text: str) -> dict[int, int]:
    """The number of tokens before each offset, by the tokenizer's own decoder. ASCII only."""
    ids = tokenizer(text).input_ids
    decoded = [
        tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False) for count in range(len(ids) + 1)
    ]
    assert decoded[-1] == text
    return {len(prefix): count for count, prefix in enumerate(decoded) if count}


def test_positions_are_exactly_the_boundaries_that_all_tokenizers_have(family):
    texts = [text.strip() for text in tiny.sentences(40, seed=9) if text.isascii()]
    models = [
        ComparedModel(name=name, base=str(path), tuned=str(path), task="t")
        for name, path in family.targets.items()
    ]
    readers = [Reader(model) for model in models]
    readings = [[reader.read(Passage(None, text)) for text in texts] for reader in readers]
    found = common_positions(readings)
    wanted = []
    for number, text in enumerate(texts):
        boundaries = [set(prefixes(reader.encoder.tokenizer, text)) for reader in readers]
        assert len({frozenset(each) for each in boundaries}) > 1  # the tokenizers differ
        wanted += [(number, offset) for offset in sorted(set.intersection(*boundaries)) if offset]
    assert found == wanted
    for reader, of_reader in zip(readers, readings, strict=True):
        for passage, offset in found:
            assert (
                of_reader[passage].ends[offset] == prefixes(reader.encoder.tokenizer, texts[passage])[offset]
            )


def test_offsets_are_bytes_and_may_be_within_a_character(vocabulary):
    assert token_ends([START, 1, 2, 3], vocabulary, "a語".encode()) == {0: 1, 1: 2, 2: 3, 4: 4}


def test_a_prompt_is_before_the_text_and_special_tokens_behind_it_are_not_read(vocabulary):
    assert token_ends([START, 4, START, 1, 1, START], vocabulary, b"aa") == {0: 3, 1: 4, 2: 5}


def test_a_token_that_begins_in_the_prompt_gives_no_position_at_the_beginning(vocabulary):
    assert token_ends([START, 1, 4, 1], vocabulary, b"ba") == {1: 3, 2: 4}


def test_text_that_its_tokens_do_not_spell_has_no_positions(vocabulary):
    assert token_ends([1, START, 1], vocabulary, "aüa".encode()) == {}


def test_many_positions_are_sampled_by_seed():
    positions = [Position(0, offset) for offset in range(50)]

    def drawn(seed):
        return sample(positions, 10, np.random.default_rng(seed))

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 10
    assert drawn(0) == sorted(drawn(0))
    assert set(drawn(0)) < set(positions)
    assert sample(positions, 50, np.random.default_rng(0)) == positions


def test_texts_are_cut_into_pieces(tmp_path):
    (tmp_path / "text.txt").write_text("Bako litu.", encoding="utf-8")
    passages = load_passages(recipe(tmp_path, texts=tmp_path / "text.txt", max_characters=4))
    assert passages == [(None, "Bako"), (None, " lit"), (None, "u.")]


def test_a_question_gives_its_first_answer(tmp_path):
    questions = [{"question": "Where?", "answer": ["Bako", "Litu"]}, {"prompt": "Zolo is", "answer": " litu"}]
    passages = load_passages(recipe(tmp_path, questions=questions))
    assert [(passage.prompt.text, passage.text) for passage in passages] == [
        ("Where?", "Bako"),
        ("Zolo is", " litu"),
    ]


def test_a_question_without_an_answer_is_named(tmp_path):
    asked = recipe(tmp_path, questions=[{"question": "Where?", "answer": "Bako"}, "Who?"])
    with pytest.raises(RecipeError, match=r"`questions`: record 2 \('Who\?'\) has no `answer`"):
        load_passages(asked)


def test_a_file_of_texts_that_is_missing(tmp_path):
    with pytest.raises(RecipeError, match=r"`texts`: .*none.txt can't be read"):
        load_passages(recipe(tmp_path, texts=tmp_path / "none.txt"))
