"""A tokenizer is read only if its own tokens for a plain sentence join to that sentence."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import VocabularyError, load_vocabulary, read_vocabulary


def with_step(tokenizer, **steps):
    """The same tokenizer with another decoder, normalizer or pre-tokenizer."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for step, value in steps.items():
        setattr(backend, step, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def test_every_family_is_read(any_family):
    assert read_vocabulary(any_family.tokenizer).tokens == any_family.vocabulary.tokens


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.NFKC(),
        normalizers.BertNormalizer(),
        normalizers.Replace("a", "4"),
    ],
    ids=["lower case", "without accents", "NFKC", "BERT", "another letter"],
)
@pytest.mark.parametrize("name", ["byte_level", "word_piece"])
def test_a_normalizer_that_folds_characters_is_no_reason_to_refuse(family, name, normalizer):
    assert read_vocabulary(with_step(family(name).tokenizer, normalizer=normalizer)).tokens


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("byte_fallback", decoders.ByteLevel()),
        ("byte_fallback_metaspace", decoders.ByteLevel()),
        ("byte_fallback_without_prefix", decoders.Fuse()),
        ("metaspace", decoders.ByteLevel()),
        ("unigram", decoders.Fuse()),
        ("unigram_with_bytes", decoders.Metaspace()),
        ("byte_level", decoders.Metaspace()),
        ("word_piece", decoders.Metaspace()),
    ],
)
def test_a_decoder_of_another_kind_of_vocabulary_is_refused(family, name, decoder):
    with pytest.raises(VocabularyError, match=r"misread: (it encodes|\d+ tokens begin with)"):
        read_vocabulary(with_step(family(name).tokenizer, decoder=decoder), "misread")


def with_few_words(read):
    """So few tokens begin with `▁` that only a sentence shows that the decoder leaves them as they are."""
    state = json.loads(read.tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["model"]["vocab"] if not token.startswith("▁") or token == "▁"]
    state["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if {*pair, "".join(pair)} <= {*kept}
    ]
    state["added_tokens"] = [{**token, "id": kept.index(token["content"])} for token in state["added_tokens"]]
    state["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **read.tokenizer.special_tokens_map)


def test_the_message_shows_the_sentence_and_what_came_back(llama_like, tmp_path):
    with_few_words(llama_like).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError) as refusal:
        load_vocabulary(str(tmp_path))
    assert str(refusal.value) == (
        f"{tmp_path}: it encodes 'the cat sat on the mat' to tokens that its decoder (ByteLevel)"
        " joins to '▁the▁cat▁sat▁on▁the▁mat': the rules of this tokenizer do not"
        " belong together. Save it again (`save_pretrained`) with the class that the model was trained with,"
        " or correct `decoder` in its tokenizer.json"
    )


def test_words_that_lose_the_space_between_them_are_refused(gpt2_like):
    """No sign is left in the text: its pre-tokenizer drops the spaces."""
    tokenizer = with_step(
        gpt2_like.tokenizer,
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    )
    with pytest.raises(VocabularyError, match="joins to 'thecatsatonthemat'"):
        read_vocabulary(tokenizer)


def test_letters_that_no_token_spells_may_be_lost(merging):
    assert read_vocabulary(merging.tokenizer) == merging.vocabulary


def test_a_tokenizer_that_truncates_and_pads_is_read(gpt2_like):
    tokenizer = with_step(gpt2_like.tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert read_vocabulary(tokenizer).tokens == gpt2_like.vocabulary.tokens
    tokenizer.backend_tokenizer.enable_truncation(60)
    comma = gpt2_like.vocabulary.ids[b","]
    tokenizer.backend_tokenizer.enable_padding(length=60, pad_id=comma, pad_token=",")
    assert read_vocabulary(tokenizer).tokens == gpt2_like.vocabulary.tokens
