"""What a token stands for is what its tokenizer's decoder writes for it in the midst of a text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from xgrammar import TokenizerInfo, VocabType

from trimtab_mappings import VocabularyError, read_vocabulary


def with_decoder(decoder, tokens=("▁the", "▁cat", "s"), model=models.BPE):
    """A tokenizer with this decoder, of tokens that are spelled with `▁`."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        model(vocabulary, []) if model is models.BPE else model(vocabulary, unk_token=tokens[0])
    )
    if decoder:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def as_taken(read, text):
    """What the tokenizer makes of a text by its documentation: composed, `▁` as a space, a dummy prefix."""
    normalizer = read.tokenizer.backend_tokenizer.normalizer
    if isinstance(normalizer, normalizers.NFC):
        text = unicodedata.normalize("NFC", text)
    if "▁" in read.tokenizer.get_vocab():
        text = text.replace("▁", " ")
    # Metaspace puts none before a space, Prepend always does
    prefixed = read.vocabulary.dummy_prefix and ("Prepend" in str(normalizer) or not text.startswith(" "))
    return " " + text if text and prefixed else text


def is_word_start(read, ids):
    return bool(ids) and not read.tokenizer.convert_ids_to_tokens(ids[0]).startswith("##")


def is_text(token):
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


@given(text=st.text())
@example(text="")
@example(text="▁e\u0301▁▁Ġ")
@example(text=" a  b ")
@example(text="the cat</think>\r\n\t\0\x7f")
@example(text="<think>the cat<")
def test_the_tokens_of_any_text_join_to_its_bytes(complete, text):
    ids = complete.natively(text)
    assume(complete.vocabulary.special.isdisjoint(ids))
    assert complete.joined(ids).decode() == as_taken(complete, text)


@given(data=st.data())
def test_without_bytes_the_same_holds_for_all_known_characters(incomplete, data):
    text = data.draw(st.text(st.sampled_from(incomplete.characters)))
    if incomplete.tokenizer.backend_tokenizer.normalizer:
        text = " ".join(text.split())  # as that tokenizer does
    ids = incomplete.natively(text)
    assume(incomplete.vocabulary.special.isdisjoint(ids))
    assert incomplete.joined(ids).decode() == as_taken(incomplete, text)


@given(data=st.data())
def test_word_piece_reads_words_with_the_space_before_them(bert_like, data):
    letters = [letter for letter in bert_like.characters if letter.isalpha() and letter not in "中国文"]
    words = st.lists(st.text(st.sampled_from(letters), min_size=1, max_size=20), min_size=1)
    text = " ".join(data.draw(words))
    assert bert_like.joined(bert_like.natively(text)) == b" " + text.encode()


@given(data=st.data())
def test_word_piece_loses_what_its_own_decoder_loses(bert_like, data):
    known = {token.decode().strip() for token in bert_like.vocabulary.ids}
    characters = sorted(character for character in known if len(character) == 1)
    ids = bert_like.natively(data.draw(st.text(st.sampled_from([" ", "\n", *characters]))))
    assume(bert_like.vocabulary.special.isdisjoint(ids))
    written = bert_like.tokenizer.backend_tokenizer.decode(ids)
    assert bert_like.joined(ids).decode().removeprefix(" ") == written


@given(data=st.data())
def test_tokens_in_any_order_join_to_what_the_decoder_writes(any_family, data):
    # what is no text they write as �, each in its own way
    snow = [i for i in any_family.natively("☃❄") if i not in any_family.vocabulary.special]
    pieces = [snow, *([i] for i, token in enumerate(any_family.vocabulary.tokens) if is_text(token))]
    start = data.draw(st.sampled_from([piece for piece in pieces if is_word_start(any_family, piece)]))
    ids = sum(data.draw(st.lists(st.sampled_from(pieces))), start)
    decode = any_family.tokenizer.backend_tokenizer.decode
    text, first = (any_family.joined(some).decode() for some in (ids, start))
    # what stands at the start may lose its spaces
    assert text.removeprefix(first) == decode(ids).removeprefix(decode(start))


def test_the_bytes_are_those_that_xgrammar_reads(with_spaces):
    info = TokenizerInfo.from_huggingface(with_spaces.tokenizer, stop_token_ids=[0])
    theirs = list(info.decoded_vocab)
    if info.vocab_type == VocabType.RAW:  # there it leaves the sign for a space in its place
        theirs = [token.replace("▁".encode(), b" ") for token in theirs]
    special = with_spaces.vocabulary.special
    assert [b"" if i in special else token for i, token in enumerate(theirs)] == [
        *with_spaces.vocabulary.tokens
    ]


def test_word_piece_closes_up_punctuation_only_where_its_decoder_does():
    tokens = ("[UNK]", "a", "##b", ",", "##,", "n't", "(")
    tidy, plain = (
        read_vocabulary(with_decoder(decoders.WordPiece(cleanup=cleanup), tokens, models.WordPiece)).tokens
        for cleanup in (True, False)
    )
    assert tidy == (b"", b" a", b"b", b",", b",", b"n't", b" (")
    assert plain == (b"", b" a", b"b", b" ,", b",", b" n't", b" (")


def test_word_piece_is_read_though_its_first_token_continues_a_word():
    tokenizer = with_decoder(decoders.WordPiece(), ("##a", "##b", "c"), models.WordPiece)
    assert read_vocabulary(tokenizer).tokens == (b"a", b"b", b" c")


def test_a_byte_token_is_text_where_the_decoder_knows_no_bytes():
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens = ("<0xE4>", "<0x61>", "▁a", "<0x4>", "<0x6c>")
    with_bytes = read_vocabulary(with_decoder(decoders.Sequence(steps), tokens))
    without = read_vocabulary(with_decoder(decoders.Sequence(steps[::2]), tokens))
    assert with_bytes.tokens == (b"\xe4", b"a", b" a", b"<0x4>", b"l")
    assert with_bytes.byte_fallback == {0, 1, 4}
    assert without.tokens == (b"<0xE4>", b"<0x61>", b" a", b"<0x4>", b"<0x6c>")
    assert without.byte_fallback == frozenset()


def test_a_spelling_outside_the_byte_level_alphabet_is_plain_text():
    tokens = ("Ġ", "Ġa b", "Ċ", "é", "中")
    read = read_vocabulary(with_decoder(decoders.ByteLevel(), tokens)).tokens
    assert read == (b" ", "Ġa b".encode(), b"\n", b"\xe9", "中".encode())


def test_added_tokens_stand_for_what_they_are_matched_against():
    tokenizer = with_decoder(decoders.ByteLevel())
    tokenizer.add_tokens([AddedToken("é!", special=False), AddedToken("a b▁", special=False)])
    assert read_vocabulary(tokenizer).tokens[3:] == ("é!".encode(), "a b▁".encode())


def test_an_added_token_that_the_model_has_stands_for_what_the_decoder_writes():
    tokenizer = with_decoder(decoders.Metaspace())
    tokenizer.add_tokens([AddedToken("▁cat", special=False)])
    assert read_vocabulary(tokenizer).tokens == (b" the", b" cat", b"s")


def test_ids_that_no_token_has_are_empty():
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.Fuse()
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.tokens == (b"a", b"", b"", b"", b"", b"b")
    assert len(vocabulary) == 6


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(VocabularyError, match="bytes: ByT5Tokenizer is not a fast tokenizer"):
        read_vocabulary(ByT5Tokenizer(), "bytes")


@pytest.mark.parametrize("model", [models.BPE, models.WordLevel, models.WordPiece])
def test_a_tokenizer_without_decoder_is_refused(model):
    tokenizer = with_decoder(None, model=model)
    with pytest.raises(VocabularyError, match="words: it has no decoder that says what its tokens stand for"):
        read_vocabulary(tokenizer, "words")


@pytest.mark.parametrize(
    ("decoder", "step"),
    [
        (decoders.BPEDecoder(suffix="</w>"), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Replace(Regex("s$"), "")]), "Replace"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(decoder, step):
    tokenizer = with_decoder(decoder)
    with pytest.raises(
        VocabularyError, match=f"odd: tokens can't be read as bytes through its decoder's {step}"
    ):
        read_vocabulary(tokenizer, "odd")


@pytest.mark.parametrize(
    "steps",
    [
        [
            decoders.Replace("▁", " "),
            decoders.Strip(" ", 1, 0),
            decoders.Fuse(),
        ],  # of every token, not the text
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(" cats", " dogs")],  # across tokens
        [decoders.Metaspace(), decoders.WordPiece()],  # one after the other
    ],
)
def test_a_decoder_that_does_not_write_its_tokens_joined_is_refused(steps):
    tokenizer = with_decoder(decoders.Sequence(steps))
    with pytest.raises(
        VocabularyError, match=r"odd: tokens \[0, 1, 2\] join to '.*', but its decoder writes '.*'"
    ):
        read_vocabulary(tokenizer, "odd")


def test_an_added_token_of_word_piece_is_a_word_as_its_decoder_writes_it(bert_like):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bert_like.tokenizer.backend_tokenizer.to_str())
    )
    tokenizer.add_tokens([AddedToken("foo", special=False)])
    vocabulary = read_vocabulary(tokenizer)
    added = tokenizer.convert_tokens_to_ids("foo")
    word = bert_like.vocabulary.ids[b" the"]
    assert vocabulary.tokens[added] == b" foo"
    assert tokenizer.backend_tokenizer.decode([word, added]) == "the foo"
