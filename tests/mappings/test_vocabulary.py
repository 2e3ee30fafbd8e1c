"""A vocabulary is the bytes that a tokenizer's tokens stand for, however it spells them."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trimtab_mappings import VocabularyError, load_tokenizer, load_vocabulary, read_vocabulary
from trimtab_mappings.vocabulary import index_tokens

# no `<`, of which special tokens are made; no `▁`, which SentencePiece itself takes for a space
TEXT = st.text(st.characters(exclude_characters="<▁", exclude_categories=["Cs"]))
KNOWN_TEXT = st.lists(st.sampled_from(["the", "cat", "中文", "naïve", "x", ","])).map(" ".join)


def from_spellings(spellings, **roles):
    """A byte-level tokenizer with these tokens and no merges."""
    backend = Tokenizer(models.BPE({spelling: i for i, spelling in enumerate(spellings)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def copy_of(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        **tokenizer.special_tokens_map,
    )


@given(text=TEXT)
def test_the_bytes_of_a_text_s_tokens_join_to_the_text(complete, text):
    text = unicodedata.normalize("NFC", text)  # as one of the families does
    data = text.encode()
    joined = complete.joined(complete.tokenizer.encode(text, add_special_tokens=False))
    assert joined in (data, b" " + data)


@given(text=KNOWN_TEXT)
def test_the_same_holds_without_bytes_for_characters_that_are_known(incomplete, text):
    joined = incomplete.joined(incomplete.tokenizer.encode(text, add_special_tokens=False))
    assert joined in (text.encode(), b" " + text.encode())


def test_tokens_of_one_spelling_rule_have_the_bytes_of_another(gpt2_like, llama_like):
    assert {"Ġ", "Ċ"} <= gpt2_like.tokenizer.get_vocab().keys()
    assert {"▁", "\n"} <= llama_like.tokenizer.get_vocab().keys()
    both = gpt2_like.vocabulary.ids.keys() & llama_like.vocabulary.ids.keys()
    assert {b" ", "中".encode(), b"\n"} <= both


def test_every_byte_has_a_token_in_a_family_with_bytes(complete):
    assert all(bytes([byte]) in complete.vocabulary.ids for byte in range(256))


def test_special_tokens_stand_for_no_text(any_family):
    vocabulary = any_family.vocabulary
    assert vocabulary.special == {0, 1, 2}
    assert {vocabulary.tokens[i] for i in vocabulary.special} == {b""}
    assert vocabulary.roles == {"unk": (0,), "bos": (1,), "eos": (2,)}


def test_a_dummy_prefix_is_noticed(any_family):
    text = any_family.tokenizer.encode("a", add_special_tokens=False)
    assert any_family.vocabulary.dummy_prefix == (any_family.joined(text) == b" a")


def test_gpt2_has_no_dummy_prefix_and_llama_has(gpt2_like, llama_like):
    assert not gpt2_like.vocabulary.dummy_prefix
    assert llama_like.vocabulary.dummy_prefix


def test_byte_tokens_are_told_from_tokens_of_text(gpt2_like, llama_like):
    assert gpt2_like.vocabulary.byte_fallback == frozenset()
    assert llama_like.vocabulary.byte_fallback == set(range(3, 259))
    assert llama_like.vocabulary.tokens[3 + 0xE4] == b"\xe4"


def test_a_letter_s_own_token_comes_before_its_byte_token(llama_like):
    assert llama_like.vocabulary.tokens[3 + ord("t")] == b"t"
    assert llama_like.vocabulary.ids[b"t"] >= 259


def test_the_lowest_id_stands_for_tokens_of_the_same_bytes():
    assert index_tokens([b"", b"b", b"a", b"a", b"b"], byte_fallback={1}) == {b"a": 2, b"b": 4}


def test_added_tokens_that_are_not_special_stand_for_what_they_are_matched_against(gpt2_like):
    tokenizer = copy_of(gpt2_like.tokenizer)
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("é!", special=False)])
    tokenizer.add_tokens([AddedToken("<|image|>", special=True)], special_tokens=True)
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.tokens[size:] == (b"<think>", "é!".encode(), b"")
    assert vocabulary.special == gpt2_like.vocabulary.special | {size + 2}


def test_ids_that_no_token_has_are_empty():
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.tokens == (b"a", b"", b"", b"", b"", b"b")
    assert len(vocabulary) == 6


def test_further_tokens_that_end_a_generation_are_special_and_have_their_role(gpt2_like):
    tokenizer = copy_of(gpt2_like.tokenizer)
    tokenizer.add_tokens(["<|eot|>"])
    end_of_turn = len(tokenizer) - 1
    vocabulary = read_vocabulary(tokenizer, eos_ids=[2, end_of_turn])
    assert vocabulary.roles["end_of_turn"] == (end_of_turn,)
    assert end_of_turn in vocabulary.special
    assert vocabulary.tokens[end_of_turn] == b""


def test_text_that_ends_a_generation_stays_text(gpt2_like):
    newline = gpt2_like.vocabulary.ids[b"\n"]
    vocabulary = read_vocabulary(gpt2_like.tokenizer, eos_ids=[2, newline])
    assert vocabulary.tokens[newline] == b"\n"
    assert "end_of_turn" not in vocabulary.roles


def test_the_generation_config_says_what_else_ends_a_generation(gpt2_like, tmp_path):
    tokenizer = copy_of(gpt2_like.tokenizer)
    tokenizer.add_tokens(["<|eot|>"])
    tokenizer.save_pretrained(tmp_path)
    end_of_turn = len(tokenizer) - 1
    GenerationConfig(eos_token_id=[2, end_of_turn]).save_pretrained(tmp_path)
    assert load_vocabulary(str(tmp_path)).roles["end_of_turn"] == (end_of_turn,)


@pytest.mark.parametrize("eos", [None, 2])
def test_a_generation_config_may_say_little_or_nothing(gpt2_like, tmp_path, eos):
    gpt2_like.tokenizer.save_pretrained(tmp_path)
    if eos is not None:
        GenerationConfig(eos_token_id=eos).save_pretrained(tmp_path)
    vocabulary = load_vocabulary(str(tmp_path))
    assert vocabulary.name == str(tmp_path)
    assert vocabulary.fingerprint == gpt2_like.vocabulary.fingerprint


def test_the_fingerprint_is_of_all_that_a_table_depends_on():
    tokenizers = [
        from_spellings("ab"),
        from_spellings("ba"),
        from_spellings(["a", "b", "c"]),
        from_spellings(["a", "b", "c"], eos_token="c"),
        from_spellings(["a", "b", "c"], bos_token="c"),
        from_spellings(["ab", "c"]),
        from_spellings(["a", "bc"]),
    ]
    assert len({read_vocabulary(tokenizer).fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert read_vocabulary(from_spellings("ab"), "other name").fingerprint == (
        read_vocabulary(from_spellings("ab")).fingerprint
    )


def test_a_tokenizer_without_special_tokens_is_read_without_a_warning():
    assert read_vocabulary(from_spellings("ab")).roles == {}


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(VocabularyError, match=f"no tokenizer can be loaded from '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


def test_a_word_piece_tokenizer_is_refused(tmp_path):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match=r"WordPiece vocabulary do not join"):
        load_tokenizer(str(tmp_path))


def test_a_slow_tokenizer_is_refused(tmp_path):
    from transformers import ByT5Tokenizer

    with pytest.raises(VocabularyError, match="bytes: ByT5Tokenizer is not a fast tokenizer"):
        read_vocabulary(ByT5Tokenizer(), "bytes")


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    configuration = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    with pytest.raises(VocabularyError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path))
