"""Tokenizers are loaded from a model's directory, whatever kind of file they are in."""

from __future__ import annotations

import base64
import json
import socket
import tempfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken import Encoding
from transformers import ByT5Tokenizer, GenerationConfig

from trimtab_mappings import ByteEncoder, VocabularyError, load_encoder, load_tokenizer, load_vocabulary

V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = "tekken_240718.json"
UNREADABLE = "no tokenizer can be loaded from"


def save_with_end_of_turn(read, directory):
    """Save a copy of the tokenizer with a further token; its id."""
    read.tokenizer.save_pretrained(directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens(["<|eot|>"])
    tokenizer.save_pretrained(directory)
    return len(tokenizer) - 1


def test_a_tokenizer_that_was_saved_is_loaded_as_it_was(any_family, tmp_path):
    any_family.tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.vocabulary.name == str(tmp_path)
    assert encoder.vocabulary.fingerprint == any_family.vocabulary.fingerprint
    assert encoder.encode(b" the cat") == any_family.encoder.encode(b" the cat")


def test_a_vocabulary_is_read_as_the_encoder_has_it(llama_like, tmp_path):
    llama_like.tokenizer.save_pretrained(tmp_path)
    assert load_vocabulary(str(tmp_path)) == load_encoder(str(tmp_path)).vocabulary


def test_the_generation_config_says_what_else_ends_a_generation(gpt2_like, tmp_path):
    end_of_turn = save_with_end_of_turn(gpt2_like, tmp_path)
    assert load_vocabulary(str(tmp_path)).tokens[end_of_turn] == b"<|eot|>"
    GenerationConfig(eos_token_id=[2, end_of_turn]).save_pretrained(tmp_path)
    assert load_vocabulary(str(tmp_path)).roles["end_of_turn"] == (end_of_turn,)
    assert load_encoder(str(tmp_path)).vocabulary.roles["end_of_turn"] == (end_of_turn,)


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{}", "[]", "no json", '{"eos_token_id": 2}', '{"eos_token_id": []}'),
        *('{"eos_token_id": 1.5}', '{"eos_token_id": true}', '{"eos_token_id": [[2], null]}'),
    ],
)
def test_a_generation_config_may_say_little_or_nothing(gpt2_like, tmp_path, content):
    gpt2_like.tokenizer.save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert load_vocabulary(str(tmp_path)).fingerprint == gpt2_like.vocabulary.fingerprint


def test_the_chat_template_beside_a_tokenizer_says_what_ends_a_turn(gpt2_like, tmp_path):
    end_of_turn = save_with_end_of_turn(gpt2_like, tmp_path)
    template = "{% for message in messages %}{{ message.content }}<|eot|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert load_vocabulary(str(tmp_path)).roles["end_of_turn"] == (end_of_turn,)


@pytest.fixture(scope="module")
def in_tiktoken(tiktoken_file) -> tuple[ByteEncoder, Encoding]:
    """A tokenizer in a tiktoken file, as it is loaded and as tiktoken itself has it."""
    lines = tiktoken_file.read_text(encoding="utf-8").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    own = Encoding("tiny", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    return load_encoder(str(tiktoken_file.parent)), own


def test_a_tiktoken_file_is_read_as_tiktoken_reads_it(in_tiktoken):
    encoder, own = in_tiktoken
    text = range(own.n_vocab)
    assert [*encoder.vocabulary.tokens[: own.n_vocab]] == [own.decode_single_token_bytes(i) for i in text]
    assert encoder.vocabulary.special == {*range(len(encoder.vocabulary))} - {*text}


@given(text=st.text())
def test_what_tiktoken_encodes_joins_to_the_text(in_tiktoken, text):
    encoder, own = in_tiktoken
    assert encoder.join(own.encode(text, disallowed_special=())) == text.encode()


def test_a_tiktoken_file_that_was_replaced_is_read_anew(tiktoken_file, tmp_path):
    path = tmp_path / tiktoken_file.name
    lines = tiktoken_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for size in (len(lines), 300):
        path.write_text("".join(lines[:size]), encoding="utf-8")
        assert len(load_vocabulary(str(tmp_path))) == size


@pytest.mark.parametrize(("path", "size"), [(V1, 32_000), (V3, 32_768), (TEKKEN, 131_072)])
def test_mistral_s_own_file_alone_is_enough(mistral, path, size):
    vocabulary = mistral[path].vocabulary
    assert len(vocabulary) == size
    names = mistral[path].tokenizer.convert_ids_to_tokens(range(len(vocabulary)))
    roles = {role: [names[i] for i in ids] for role, ids in vocabulary.roles.items()}
    assert roles | {"pad": ["<pad>"]} == {"bos": ["<s>"], "eos": ["</s>"], "unk": ["<unk>"], "pad": ["<pad>"]}


def test_mistral_s_own_file_is_what_others_call_a_sentencepiece_model(mistral, mistral_data, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(mistral_data / V3)
    assert load_vocabulary(str(tmp_path)).fingerprint == mistral[V3].vocabulary.fingerprint


@pytest.mark.parametrize("name", ["spiece.model", "spm.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_is_found_by_its_other_names(mistral, mistral_data, tmp_path, name):
    (tmp_path / name).symlink_to(mistral_data / V3)
    assert load_vocabulary(str(tmp_path)).fingerprint == mistral[V3].vocabulary.fingerprint


def test_of_several_of_mistral_s_files_the_newest_is_read(mistral, mistral_data, tmp_path):
    for version, source in (("v1", V1), ("v3", V3)):
        (tmp_path / f"tokenizer.model.{version}").symlink_to(mistral_data / source)
    assert load_vocabulary(str(tmp_path)).fingerprint == mistral[V3].vocabulary.fingerprint


def test_beside_mistral_s_own_file_a_tokenizer_json_is_read(gpt2_like, mistral_data, tmp_path):
    gpt2_like.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model.v3").symlink_to(mistral_data / V3)
    assert load_vocabulary(str(tmp_path)).fingerprint == gpt2_like.vocabulary.fingerprint


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gpt2", "gemma"])
def test_mistral_s_own_file_is_found_whatever_the_model_is(mistral, mistral_data, tmp_path, model_type):
    (tmp_path / "tokenizer.model.v3").symlink_to(mistral_data / V3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    assert load_vocabulary(str(tmp_path)).fingerprint == mistral[V3].vocabulary.fingerprint


def test_mistral_s_own_class_does_not_come_before_the_fast_one(mistral, mistral_data, tmp_path):
    (tmp_path / "tekken.json").symlink_to(mistral_data / TEKKEN)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    assert load_vocabulary(str(tmp_path)).fingerprint == mistral[TEKKEN].vocabulary.fingerprint


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(VocabularyError, match=f"{UNREADABLE} '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gemma", "bert"])
def test_a_model_s_config_is_not_taken_for_a_tokenizer(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(VocabularyError, match=f"{UNREADABLE} '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"no json"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "Strange"}}'),
        ("tokenizer.model", b"\0\1no tokens"),
        ("tokenizer.model.v3", b"\0\1no tokens"),
        ("spiece.model", b"\0\1no tokens"),
        ("tekken.json", b"{}"),
    ],
)
def test_a_malformed_file_is_refused_and_its_directory_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabularyError, match=f"{UNREADABLE} '{tmp_path}': ") as error:
        load_tokenizer(str(tmp_path))
    others = str(error.value).replace(str(tmp_path), "")
    assert tempfile.gettempdir() not in others
    assert "\n" not in others


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No answer from the hub, and an empty cache."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    url = f"http://127.0.0.1:{port}/{{repo_id}}/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("load", [load_tokenizer, load_vocabulary, load_encoder])
@pytest.mark.usefixtures("no_network")
def test_a_hub_id_without_a_network_is_one_plain_error_at_once(caplog, load):
    fault = "there is no such directory, and the hub does not answer"
    start = time.monotonic()
    with pytest.raises(VocabularyError, match=rf"^{UNREADABLE} 'org/name': {fault} \(.*\)$"):
        load("org/name")
    assert time.monotonic() - start < 1  # the hub's client would wait for one second before its second try
    assert caplog.text == ""


def test_a_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match=f"{tmp_path}: ByT5Tokenizer is not a fast tokenizer"):
        load_tokenizer(str(tmp_path))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    configuration = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    with pytest.raises(VocabularyError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path))


def test_what_is_plainly_no_model_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    faults = {
        tmp_path / "file": "it is a file; name the directory of the model",
        tmp_path / "nowhere": "there is no such directory",
        tmp_path: "there are no files of a tokenizer in it",
    }
    for path, fault in faults.items():
        with pytest.raises(VocabularyError, match=f"{UNREADABLE} '{path}': {fault}"):
            load_tokenizer(str(path))


@pytest.mark.parametrize("content", ["no json", "[]", '{"max_new_tokens": -5}'])
def test_a_generation_config_that_can_not_be_read_is_named(gpt2_like, tmp_path, caplog, content):
    gpt2_like.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    vocabulary = load_vocabulary(str(tmp_path))
    assert vocabulary.fingerprint == gpt2_like.vocabulary.fingerprint
    assert f"{tmp_path / 'generation_config.json'} can't be read" in caplog.text
