"""The encoder's tokens join to exactly the bytes that it was given."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, VocabularyError, read_vocabulary

PARTS = st.sampled_from(
    [
        *(
            text.encode()
            for text in ("the cat", " ", "  ", "\n", "▁", "é", "e\u0301", "中文", "🙂", "ﬁ", "A")
        ),
        *(b"<s>", b"</s>", b"<unk>", b"<0x41>", b"\xff", b"\xc3", b"\xe4\xb8", b"\x80", b"\xed\xa0\x80"),
    ]
)
BYTES = st.one_of(st.binary(), st.text().map(str.encode), st.lists(PARTS).map(b"".join))
SMILE = "🙂".encode()


def changed(read, change):
    """The encoder of a copy of the tokenizer, to whose backend `change` was done."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    change(backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **read.tokenizer.special_tokens_map)
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer))


def spelled(encoder, data):
    ids, waiting = encoder.encode(data)
    return b"".join(encoder.vocabulary.tokens[i] for i in ids) + waiting


@given(data=BYTES)
@example(data=b"")
def test_tokens_and_waiting_bytes_join_to_any_bytes(complete, data):
    ids, waiting = complete.encoder.encode(data)
    assert complete.joined(ids) + waiting == data
    assert complete.vocabulary.special.isdisjoint(ids)


@given(data=st.data())
@example(data=None)
def test_the_same_holds_without_bytes_for_all_known_characters(incomplete, data):
    text = data.draw(st.text(st.sampled_from(incomplete.characters))) if data else "  the</s>cat  "
    assert spelled(incomplete.encoder, text.encode()) == text.encode()


@given(data=st.data())
def test_word_piece_spells_words_of_known_characters_with_single_spaces(bert_like, data):
    letters = [character for character in bert_like.characters if character.isalpha()]
    words = st.lists(st.text(st.sampled_from(letters), min_size=1), min_size=1)
    text = data.draw(st.sampled_from(["", " "])) + " ".join(data.draw(words))
    assert spelled(bert_like.encoder, text.encode()) == text.encode()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b" the hello", ["the", "hello"]),
        (b"he hello", ["##he", "hello"]),
        (b"llo, hello", ["##llo", ",", "hello"]),
    ],
)
def test_a_word_piece_text_starts_in_the_midst_of_a_word_or_with_a_space(bert_like, text, tokens):
    assert bert_like.tokenizer.convert_ids_to_tokens(bert_like.encoder.encode(text)[0]) == tokens


@given(data=BYTES)
def test_what_waits_is_an_unfinished_character_at_the_very_end(gpt2_like, data):
    _, waiting = gpt2_like.encoder.encode(data)
    assert len(waiting) < 4
    if waiting:
        with pytest.raises(UnicodeDecodeError, match="unexpected end of data"):
            waiting.decode()


@pytest.mark.parametrize("received", [1, 2, 3])
def test_a_character_waits_for_its_last_byte(any_family, received):
    ids, waiting = any_family.encoder.encode(b"cat" + SMILE[:received])
    assert (any_family.joined(ids), waiting) == (b"cat", SMILE[:received])


def test_a_whole_character_waits_for_nothing(any_family):
    assert any_family.encoder.encode(SMILE)[1] == b""


@pytest.mark.parametrize("data", [b"\xff", b"\x80", b"\xe4A", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5"])
def test_bytes_that_never_are_a_character_do_not_wait(llama_like, data):
    ids, waiting = llama_like.encoder.encode(data)
    assert waiting == b""
    assert llama_like.joined(ids) == data


def test_text_is_encoded_as_the_tokenizer_itself_would(any_family):
    text = "The cat sat on the mat and the naïve dog 🙂"
    prefix = " " if any_family.vocabulary.dummy_prefix else ""
    assert any_family.encoder.encode(f"{prefix}{text}".encode()) == (any_family.natively(text), b"")


def test_no_space_comes_before_the_text(any_family):
    assert spelled(any_family.encoder, b"cat") == b"cat"
    assert spelled(any_family.encoder, b" cat") == b" cat"


def test_no_space_comes_before_the_text_of_a_byte_level_tokenizer_that_adds_one(gpt2_like):
    def add_space(backend):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    encoder = changed(gpt2_like, add_space)
    assert encoder.vocabulary.dummy_prefix
    assert encoder.encode(b"cat") == gpt2_like.encoder.encode(b"cat")


@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<unk> </s>"])
def test_special_tokens_written_in_the_text_are_plain_text(any_family, text):
    assert not {*any_family.natively(text)} <= {*any_family.vocabulary.roles["unk"]}
    ids, _ = any_family.encoder.encode(text.encode())
    assert {*ids}.isdisjoint(any_family.vocabulary.special.difference(any_family.vocabulary.roles["unk"]))


def test_what_a_vocabulary_can_not_spell_becomes_one_unknown_token_a_character(incomplete):
    ids, _ = incomplete.encoder.encode("cat ☃☃ the".encode())
    assert ids.count(0) == 2
    assert incomplete.joined(ids) == b"cat  the"


def test_what_a_vocabulary_without_unknown_token_can_not_spell_is_left_out(incomplete):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(incomplete.tokenizer.backend_tokenizer.to_str())
    )
    encoder = ByteEncoder(tokenizer, read_vocabulary(tokenizer))
    assert spelled(encoder, "cat ☃☃ the\xff".encode()) == b"cat  the"


def test_the_text_around_what_can_not_be_spelled_keeps_its_tokens(incomplete):
    encode = incomplete.encoder.encode
    snowman = encode(" ☃".encode())[0]
    assert encode("cat ☃ the".encode())[0] == encode(b"cat")[0] + snowman + encode(b" the")[0]


def test_words_beside_what_can_not_be_spelled_are_merged_as_ever(merging):
    ids, _ = merging.encoder.encode("☃ abc ☃".encode())
    assert [merging.vocabulary.tokens[i] for i in ids] == [b" ", b"a", b"bc", b" "]


@given(data=BYTES)
def test_text_is_spelled_by_a_vocabulary_with_bytes_but_what_is_no_text_is_not(gpt2_like, data):
    _, waiting = gpt2_like.encoder.encode(data)
    whole = data.removesuffix(waiting)
    assert (gpt2_like.encoder.encode_natively(data) is not None) == (
        whole.decode(errors="ignore").encode() == whole
    )


@pytest.mark.parametrize(("text", "spelled"), [("cat", True), ("", True), ("cat ☃", False), ("☃", False)])
def test_text_with_an_unknown_character_is_not_spelled(incomplete, text, spelled):
    ids = incomplete.encoder.encode_natively(text.encode())
    assert ids == (incomplete.encoder.encode(text.encode())[0] if spelled else None)


def test_steps_that_change_the_text_are_left_out(llama_like):
    def lower_case(backend):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.Lowercase(), normalizers.NFKC(), backend.normalizer]
        )

    data = " The ﬁne CAT ".encode()
    assert spelled(changed(llama_like, lower_case), data) == data


@pytest.mark.parametrize("pattern", [" ", "[ ]", r"\s", r"\s+", " +", r"\x20", "(?: )"])
def test_an_expression_that_writes_a_space_as_its_sign_is_kept_for_the_space(llama_like, pattern):
    def replace(backend):
        backend.normalizer = normalizers.Replace(Regex(pattern), "▁")

    encoder = changed(llama_like, replace)
    for data in (b" the cat sat", b"the  cat\t sat\n\non"):
        assert encoder.encode(data) == llama_like.encoder.encode(data)
        assert encoder.encode_natively(data) == llama_like.encoder.encode(data)[0]


@pytest.mark.parametrize("pattern", ["c", r"\s{2,}", "^ ", "(?<=t) "])
def test_an_expression_that_is_not_for_every_space_is_left_out(llama_like, pattern):
    def replace(backend):
        steps = [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(pattern), "▁")]
        backend.normalizer = normalizers.Sequence(steps)

    data = b" the cat  sat"
    assert changed(llama_like, replace).encode(data) == llama_like.encoder.encode(data)


def test_another_sign_for_a_space_is_kept_if_the_decoder_reads_it_so(merging):
    def replace(backend):
        backend.normalizer = normalizers.Replace(" ", "Ġ")
        backend.decoder = decoders.Sequence([decoders.Replace("Ġ", " "), decoders.Fuse()])

    encoder = changed(merging, replace)
    assert encoder.encode_natively(b"a bc") == encoder.tokenizer.convert_tokens_to_ids(["a", "Ġ", "bc"])


def test_added_tokens_do_not_swallow_the_spaces_beside_them(gpt2_like):
    def add(backend):
        backend.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True, normalized=False)])

    encoder = changed(gpt2_like, add)
    think = encoder.vocabulary.ids[b"<think>"]
    assert spelled(encoder, b"a  <think>\n b") == b"a  <think>\n b"
    assert think in encoder.encode(b"a  <think>\n b")[0]


def test_merges_are_not_dropped_at_random(gpt2_like):
    def drop(backend):
        backend.model.dropout = 0.9

    encoder = changed(gpt2_like, drop)
    assert encoder.encode(b"hello world") == gpt2_like.encoder.encode(b"hello world")


def test_truncation_and_padding_are_off(gpt2_like):
    def shorten(backend):
        backend.enable_truncation(2)
        backend.enable_padding(length=9)

    encoder = changed(gpt2_like, shorten)
    data = b"hello world, the cat sat"
    assert encoder.encode(data) == gpt2_like.encoder.encode(data)
    assert encoder.encode_all([data, b"a"]) == gpt2_like.encoder.encode_all([data, b"a"])


def prepend_in_normalizer(backend):
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), backend.normalizer])


def prepend_in_pre_tokenizer(backend):
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")


def cut_at_white_space(backend):
    backend.normalizer = None
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def byte_level_with_a_space(backend):
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()


def replace_letters(backend):
    backend.normalizer = normalizers.Sequence([normalizers.Replace("c", "b"), backend.normalizer])


def truncate(backend):
    backend.enable_truncation(1)


def add_special_token(backend):
    backend.add_special_tokens(["<s>"])


def add_greedy_token(backend):
    backend.add_tokens([AddedToken("<b>", lstrip=True, rstrip=True, normalized=False)])


@pytest.mark.parametrize(
    "change",
    [
        prepend_in_normalizer,
        prepend_in_pre_tokenizer,
        cut_at_white_space,
        byte_level_with_a_space,
        replace_letters,
        truncate,
        add_special_token,
        add_greedy_token,
    ],
)
@pytest.mark.parametrize("text", ["abc", " abc", "<s>abc", " <b>abc"])
def test_the_tokenizer_s_own_merges_apply_whatever_its_other_steps_do(merging, change, text):
    encoder = changed(merging, change)
    ids, _ = encoder.encode(text.encode())
    assert [encoder.vocabulary.tokens[i] for i in ids][-2:] == [b"a", b"bc"]
    assert spelled(encoder, text.encode()) == text.encode()


def test_a_token_may_reach_across_words(merging):
    ids, _ = merging.encoder.encode(b"c a")
    assert [merging.vocabulary.tokens[i] for i in ids] == [b"c ", b"a"]


def test_the_tokenizer_itself_stays_as_it_is(any_family):
    before = any_family.tokenizer.backend_tokenizer.to_str()
    any_family.encoder.encode("The cat <s> ☃".encode())
    assert any_family.tokenizer.backend_tokenizer.to_str() == before


@given(pieces=st.lists(BYTES))
def test_a_batch_is_spelled_to_its_last_byte(complete, pieces):
    assert [complete.joined(ids) for ids in complete.encoder.encode_all(pieces)] == pieces


@given(texts=st.lists(st.text()))
def test_a_batch_is_encoded_as_one_by_one(any_family, texts):
    pieces = [text.encode() for text in texts]
    assert any_family.encoder.encode_all(pieces) == [any_family.encoder.encode(piece)[0] for piece in pieces]


def test_a_slow_tokenizer_is_refused(gpt2_like):
    from transformers import ByT5Tokenizer

    with pytest.raises(VocabularyError, match="gpt2-like: ByT5Tokenizer is not a fast tokenizer"):
        ByteEncoder(ByT5Tokenizer(), gpt2_like.vocabulary)
