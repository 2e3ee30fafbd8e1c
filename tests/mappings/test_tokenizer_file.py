"""What transformers makes of a `tokenizer.json` is held against the file, and the right side is followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from trimtab_mappings import (
    VocabularyError,
    build_table,
    load_encoder,
    load_tokenizer,
    load_vocabulary,
    read_vocabulary,
)
from trimtab_mappings.tokenizer_file import follow_file

TEXT = "the cat  sat\n on 3.14 mats, and didn't move"
WARNING = "of transformers does not follow tokenizer.json"


def change(path, **values):
    """Change values in a JSON file; an empty one is removed."""
    values = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(
        json.dumps({key: value for key, value in values.items() if value != ""}), encoding="utf-8"
    )


def save_as(tokenizer, kind, directory, **settings):
    """Save a tokenizer, and name another class of transformers beside it."""
    tokenizer.save_pretrained(directory)
    values = {"backend": "", "unk_token": "", "tokenizer_class": kind} | settings
    change(directory / "tokenizer_config.json", **values)
    return str(directory)


@pytest.fixture
def misnamed(gpt2_like, tmp_path) -> str:
    """A directory as DeepSeek's coders and distillations have it: byte-level, and called Llama's."""
    return save_as(gpt2_like.tokenizer, "LlamaTokenizerFast", tmp_path)


def test_transformers_reads_a_byte_level_file_by_the_rules_of_llama(misnamed):
    tokenizer = AutoTokenizer.from_pretrained(misnamed)
    assert tokenizer.decode(tokenizer.encode("hello world", add_special_tokens=False)) == "helloworld"


def test_a_byte_level_vocabulary_under_the_name_of_llama_is_read_as_bytes(misnamed, gpt2_like):
    encoder = load_encoder(misnamed)
    assert encoder.vocabulary.tokens == gpt2_like.vocabulary.tokens
    assert encoder.join(encoder.encode(b"hello world")[0]) == b"hello world"
    assert encoder.encode(TEXT.encode()) == gpt2_like.encoder.encode(TEXT.encode())
    assert load_vocabulary(misnamed) == encoder.vocabulary


def test_its_texts_are_encoded_as_the_file_says(misnamed):
    tokenizer, file = load_tokenizer(misnamed), Tokenizer.from_file(f"{misnamed}/tokenizer.json")
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids == file.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == file.decode(ids) == TEXT


def test_it_maps_as_the_same_tokenizer_under_its_own_name_does(misnamed, gpt2_like, llama_like):
    misread, own = load_encoder(misnamed), gpt2_like
    for theirs, ours in (
        (
            build_table(misread, llama_like.encoder),
            build_table(own.encoder, llama_like.encoder),
        ),
        (build_table(llama_like.encoder, misread), build_table(llama_like.encoder, own.encoder)),
    ):
        assert theirs.mapping[theirs.exact].tolist() == ours.mapping[ours.exact].tolist()
        assert theirs.coverage.exact == ours.coverage.exact > 0


def test_a_warning_says_which_side_is_wrong_and_what_mends_it(misnamed, caplog):
    load_vocabulary(misnamed)
    (warning,) = caplog.messages
    assert (
        f"{misnamed}: LlamaTokenizer {WARNING}: it encodes and decodes 'the cat sat on the mat' to"
        " 'thecatsatonthemat', tokenizer.json to 'the cat sat on the mat'; the library"
    ) in warning
    assert "the library follows tokenizer.json, but vLLM reads and writes text as LlamaTokenizer" in warning
    caplog.clear()
    change(Path(misnamed) / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    load_vocabulary(misnamed)
    assert caplog.messages == []
    tokenizer = AutoTokenizer.from_pretrained(misnamed)
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("byte_fallback", "GPT2TokenizerFast"),
        ("unigram", "GPT2TokenizerFast"),
        ("word_piece", "LlamaTokenizerFast"),
        ("byte_level_ignoring_merges", "Qwen2TokenizerFast"),
        ("byte_level_ignoring_merges", "LlamaTokenizerFast"),
        ("unigram", "LlamaTokenizerFast"),
    ],
)
def test_any_class_that_breaks_the_file_s_rules_is_not_followed(family, name, kind, tmp_path, caplog):
    own = family(name)
    encoder = load_encoder(save_as(own.tokenizer, kind, tmp_path, unk_token="<unk>"))
    assert WARNING in caplog.text
    assert encoder.vocabulary.fingerprint == own.vocabulary.fingerprint
    assert encoder.encode(b" the cat sat") == own.encoder.encode(b" the cat sat")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("byte_level", "GPT2TokenizerFast"),
        ("byte_fallback", "LlamaTokenizerFast"),
        ("unigram", "T5TokenizerFast"),
        ("unigram", "XLMRobertaTokenizerFast"),
        ("word_piece", "BertTokenizerFast"),
    ],
)
def test_a_class_that_fits_the_file_is_used_without_a_word(family, name, kind, tmp_path, caplog):
    directory = save_as(family(name).tokenizer, kind, tmp_path, unk_token="<unk>")
    assert type(load_tokenizer(directory)).__name__ == kind.removesuffix("Fast")
    assert caplog.messages == []


def test_the_roles_that_only_the_class_knows_are_kept(gpt2_like, tmp_path):
    directory = save_as(gpt2_like.tokenizer, "LlamaTokenizerFast", tmp_path, eos_token="")
    assert load_vocabulary(directory).roles == {"unk": (0,), "bos": (1,), "eos": (2,)}


def test_a_file_without_a_decoder_leaves_its_class_right(tmp_path, gpt2_like, caplog):
    directory = save_as(gpt2_like.tokenizer, "GPT2TokenizerFast", tmp_path)
    change(tmp_path / "tokenizer.json", decoder=None)
    assert load_vocabulary(directory).tokens[: len(gpt2_like.vocabulary)] == gpt2_like.vocabulary.tokens
    assert "the library follows GPT2Tokenizer: tokenizer.json loses text" in caplog.text


def test_a_file_that_is_as_wrong_as_its_class_is_refused(gpt2_like, tmp_path):
    directory = save_as(gpt2_like.tokenizer, "LlamaTokenizerFast", tmp_path)
    change(tmp_path / "tokenizer.json", decoder=None)
    with pytest.raises(
        VocabularyError, match=f"{WARNING}: .*; neither of them decodes 'the cat sat on the mat'"
    ):
        load_vocabulary(directory)


@pytest.mark.parametrize("order", [["model"], ["vocab"]], ids=["the model first", "the tokens first in it"])
def test_the_order_in_a_file_does_not_matter(tmp_path, gpt2_like, order):
    directory = save_as(gpt2_like.tokenizer, "LlamaTokenizerFast", tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"] = {
        key: state["model"][key] for key in sorted(state["model"], key=lambda key: key not in order)
    }
    state = {key: state[key] for key in sorted(state, key=lambda key: key not in order)}
    path.write_text(json.dumps(state), encoding="utf-8")
    assert load_vocabulary(directory).tokens == gpt2_like.vocabulary.tokens


def test_a_directory_without_the_file_is_taken_as_it_was_loaded(tmp_path, gpt2_like):
    assert follow_file(gpt2_like.tokenizer, str(tmp_path)) is gpt2_like.tokenizer
    assert follow_file(gpt2_like.tokenizer, "an-owner/a-model-that-was-never-loaded") is gpt2_like.tokenizer


def test_tokens_that_keep_the_sign_for_a_space_are_refused_wherever_the_tokenizer_is_from(
    gpt2_like, family, tmp_path
):
    gpt2_like.tokenizer.save_pretrained(tmp_path)
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(
        VocabularyError, match=r"tokens begin with 'Ġ', such as .* expected a decoder of type ByteLevel"
    ):
        read_vocabulary(tokenizer, "misread")
    backend = Tokenizer.from_str(family("metaspace").tokenizer.backend_tokenizer.to_str())
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(
        VocabularyError, match=r"tokens begin with '▁', such as .* expected a decoder of type Metaspace"
    ):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), "misread")


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_vllm_reads_and_writes_text_as_the_class_does_until_it_is_renamed(gpt2_like, tmp_path, kind):
    vllm = pytest.importorskip("vllm.tokenizers", reason="needs vLLM's own tokenizers")
    directory = save_as(gpt2_like.tokenizer, kind, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    ids = gpt2_like.encoder.encode(b"hello world")[0]
    engine = vllm.get_tokenizer(directory)
    reads_as_the_file = kind == "PreTrainedTokenizerFast"
    assert engine.decode(ids) == ("hello world" if reads_as_the_file else "helloĠworld")
    assert (engine.encode("hello world", add_special_tokens=False) == ids) == reads_as_the_file
    vocabulary = load_vocabulary(directory)
    assert b"".join(vocabulary.tokens[i] for i in ids) == b"hello world"
