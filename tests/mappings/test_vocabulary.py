"""A vocabulary is what a table needs of a tokenizer: its tokens' bytes and its special tokens' roles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hand_made
from trimtab_mappings import ROLES, read_vocabulary
from trimtab_mappings.vocabulary import index_tokens

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }} <|eot|>\n{% endfor %}"
)
NEW_SPECIALS = ["<|eot|>", "<|user|>", "<|assistant|>"]


def from_spellings(spellings, **roles):
    """A byte-level tokenizer with these tokens and no merges."""
    backend = Tokenizer(models.BPE({spelling: i for i, spelling in enumerate(spellings)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def for_chats(read, template=None):
    """A copy with tokens for chats, none of them special by itself, and where the first of them is."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(token, special=False) for token in NEW_SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **read.tokenizer.special_tokens_map)
    tokenizer.chat_template = template
    return tokenizer, tokenizer.convert_tokens_to_ids("<|eot|>")


def test_tokens_of_one_spelling_rule_have_the_bytes_of_another(gpt2_like, llama_like, bert_like):
    assert {"Ġ", "Ċ"} <= gpt2_like.tokenizer.get_vocab().keys()
    assert {"▁", "\n"} <= llama_like.tokenizer.get_vocab().keys()
    both = gpt2_like.vocabulary.ids.keys() & llama_like.vocabulary.ids.keys()
    assert {b" ", "中".encode(), b"\n"} <= both
    assert b" cat" in gpt2_like.vocabulary.ids.keys() & bert_like.vocabulary.ids.keys()


def test_every_byte_has_a_token_in_a_family_with_bytes(complete):
    assert all(bytes([byte]) in complete.vocabulary.ids for byte in range(256))


def test_special_tokens_stand_for_no_text(any_family):
    vocabulary, ids = any_family.vocabulary, any_family.tokenizer.get_vocab()
    specials = {"<unk>", "<s>", "</s>", "<|image|>"} & ids.keys()
    assert vocabulary.special == {ids[token] for token in specials}
    assert {vocabulary.tokens[i] for i in vocabulary.special} == {b""}


def test_special_tokens_have_the_roles_that_the_tokenizer_gives_them(any_family):
    ids = any_family.tokenizer.get_vocab()
    roles = {"unk": (ids["<unk>"],), "bos": (ids["<s>"],), "eos": (ids["</s>"],)}
    assert any_family.vocabulary.roles == roles


def test_a_tokenizer_without_special_tokens_is_read_without_a_warning():
    assert read_vocabulary(from_spellings("ab")).roles == {}


def test_a_dummy_prefix_is_noticed(any_family):
    assert any_family.vocabulary.dummy_prefix == (any_family.joined(any_family.natively("a")) == b" a")


def test_llama_and_bert_have_a_dummy_prefix_and_gpt2_has_none(gpt2_like, llama_like, bert_like):
    assert [read.vocabulary.dummy_prefix for read in (gpt2_like, llama_like, bert_like)] == [
        False,
        True,
        True,
    ]


def test_byte_tokens_are_told_from_tokens_of_text(gpt2_like, llama_like):
    assert gpt2_like.vocabulary.byte_fallback == frozenset()
    assert llama_like.vocabulary.byte_fallback == set(range(3, 259))
    assert llama_like.vocabulary.tokens[3 + 0xE4] == b"\xe4"


def test_a_letter_s_own_token_comes_before_its_byte_token(llama_like):
    assert llama_like.vocabulary.tokens[3 + ord("t")] == b"t"
    assert llama_like.vocabulary.ids[b"t"] >= 259


def test_the_lowest_id_stands_for_tokens_of_the_same_bytes():
    assert index_tokens([b"", b"b", b"a", b"a", b"b"], byte_fallback={1}) == {b"a": 2, b"b": 4}


@given(
    tokens=st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"\xe4"])),
    fallback=st.frozensets(st.integers(0, 9)),
)
def test_every_token_but_the_empty_one_is_found_by_its_bytes(tokens, fallback):
    fallback = {i for i in fallback if i < len(tokens) and len(tokens[i]) == 1}
    index = index_tokens(tokens, fallback)
    assert index.keys() == {*tokens} - {b""}
    for token, found in index.items():
        same = [i for i, other in enumerate(tokens) if other == token]
        assert found == min(same, key=lambda i: (i in fallback, i))


def test_what_else_ends_a_generation_is_special_and_has_its_role(gpt2_like):
    tokenizer, end_of_turn = for_chats(gpt2_like)
    vocabulary = read_vocabulary(tokenizer, eos_ids=[2, end_of_turn])
    assert vocabulary.roles["end_of_turn"] == (end_of_turn,)
    assert end_of_turn in vocabulary.special
    assert vocabulary.tokens[end_of_turn] == b""
    assert vocabulary.tokens[end_of_turn + 1] == b"<|user|>"


def test_what_the_chat_template_writes_behind_an_answer_is_an_end_of_turn(gpt2_like):
    tokenizer, end_of_turn = for_chats(gpt2_like, CHAT_TEMPLATE)
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.roles["eos"] == (2,)
    assert vocabulary.roles["end_of_turn"] == (end_of_turn,)
    assert vocabulary.tokens[end_of_turn] == b""


def test_of_what_is_written_behind_an_answer_only_the_first_token_ends_a_turn(gpt2_like):
    tokenizer, end_of_turn = for_chats(gpt2_like, "{{ messages[-1].content }}<|eot|><|user|>")
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.roles["end_of_turn"] == (end_of_turn,)
    assert vocabulary.tokens[end_of_turn + 1] == b"<|user|>"


def test_both_sources_of_an_end_of_turn_are_taken(gpt2_like):
    tokenizer, end_of_turn = for_chats(gpt2_like, CHAT_TEMPLATE)
    vocabulary = read_vocabulary(tokenizer, eos_ids=[end_of_turn + 1])
    assert vocabulary.roles["end_of_turn"] == (end_of_turn, end_of_turn + 1)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ messages[-1].content }}", id="writes nothing behind an answer"),
        pytest.param("{{ messages[-1].content }}\nUser:", id="writes plain text behind it"),
        pytest.param("{{ messages[-1].content }}\nUser:<|eot|>", id="writes plain text and then a token"),
        pytest.param("<|eot|>{{ messages[0].content }}<|eot|>", id="does not write the answer"),
        pytest.param("{{ raise_exception('no') }}<|eot|>", id="refuses the messages"),
        pytest.param("{{ messages[2].content.text }}<|eot|>", id="asks for a third message"),
        pytest.param("{{ messages[-1].content }}{{ 1 + '' }}<|eot|>", id="fails in Python"),
        pytest.param("{{ messages[-1].content }}{{ 1 / 0 }}<|eot|>", id="divides by zero"),
        pytest.param("{{ range(10 ** 9) }}{{ messages[-1].content }}<|eot|>", id="writes without end"),
        pytest.param("{% for %}<|eot|>", id="is no template"),
    ],
)
def test_no_end_of_turn_is_found_in_a_template_that(gpt2_like, template):
    tokenizer, end_of_turn = for_chats(gpt2_like, template)
    vocabulary = read_vocabulary(tokenizer)
    assert "end_of_turn" not in vocabulary.roles
    assert vocabulary.tokens[end_of_turn] == b"<|eot|>"
    assert vocabulary.fingerprint == read_vocabulary(for_chats(gpt2_like)[0]).fingerprint


def test_text_that_ends_a_generation_stays_text(gpt2_like):
    newline = gpt2_like.vocabulary.ids[b"\n"]
    vocabulary = read_vocabulary(gpt2_like.tokenizer, eos_ids=[2, newline])
    assert vocabulary.tokens[newline] == b"\n"
    assert "end_of_turn" not in vocabulary.roles


def test_an_end_of_generation_that_is_no_token_is_ignored(gpt2_like):
    assert read_vocabulary(gpt2_like.tokenizer, eos_ids=[999_999]).roles == gpt2_like.vocabulary.roles


def test_the_roles_are_those_that_a_table_knows(gpt2_like):
    tokenizer, end_of_turn = for_chats(gpt2_like)
    tokenizer.pad_token = "<|user|>"
    assert read_vocabulary(tokenizer, eos_ids=[end_of_turn]).roles.keys() == {*ROLES}


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


def test_the_fingerprint_tells_byte_tokens_from_text():
    as_bytes, as_text = from_spellings(["<0x61>"]), from_spellings(["a"])
    as_bytes.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    vocabularies = [read_vocabulary(tokenizer) for tokenizer in (as_bytes, as_text)]
    assert [vocabulary.tokens for vocabulary in vocabularies] == [(b"a",), (b"a",)]
    assert len({vocabulary.fingerprint for vocabulary in vocabularies}) == 2


def test_tokenizers_of_the_same_tokens_and_other_merges_have_other_fingerprints():
    merges = [("a", "b"), ("b", "c")]
    one, other = (
        hand_made.encoder([*"abc", "ab", "bc"], order) for order in (merges, list(reversed(merges)))
    )
    assert one.vocabulary.tokens == other.vocabulary.tokens
    assert one.encode(b"abc") != other.encode(b"abc")
    assert one.vocabulary.fingerprint != other.vocabulary.fingerprint
