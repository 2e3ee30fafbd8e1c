"""A growing text is encoded as the whole of it would be, but only its end anew."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, GrowingEncoding, read_vocabulary

PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"the", b" ", b"  ", b"\n", b"a", b"aa", b"cat", b" cat", b"!", b"!!", b"'s", b"1", b"234"]
        ),
        st.sampled_from(
            ["中文".encode(), "é".encode(), b"e\xcc\x81", b"\xe4", b"\xb8\xad", b"\xff", b"<s>", b"A"]
        ),
        st.text(max_size=3).map(str.encode),
    ),
    max_size=60,
)


def grow(encoding, pieces):
    """The text and its encoding after each piece."""
    text, ids = b"", []
    for piece in pieces:
        text += piece
        kept, ids[kept:] = encoding.encode(text)
        yield text, ids


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES)
def test_every_step_is_the_encoding_of_the_whole_text(any_family, pieces):
    for text, ids in grow(GrowingEncoding(any_family.encoder, stride=12, margin=4), pieces):
        assert ids == any_family.encoder.encode(text)[0]


@settings(deadline=None)
@given(pieces=PIECES)
def test_a_final_step_waits_for_nothing(any_family, pieces):
    encoding = GrowingEncoding(any_family.encoder, stride=12, margin=4)
    text, ids = [(b"", []), *grow(encoding, pieces)][-1]
    kept, ids[kept:] = encoding.encode(text, final=True)
    assert ids == any_family.encoder.encode_all([text])[0]


def test_what_is_encoded_anew_does_not_grow_with_the_text(any_family):
    if any_family.encoder.scores_words and not any_family.encoder.cuts_words:
        pytest.skip("Unigram without words has no joints")
    sizes = []
    for _ in grow(Spy(any_family.encoder, sizes), [b" the cat1"] * 800):
        pass
    assert max(sizes) < 2 * 256 + 64
    assert sum(sizes) < 800 * 1000


class Spy(GrowingEncoding):
    """Notes how many bytes are encoded."""

    def __init__(self, encoder, sizes):
        super().__init__(encoder)
        self._sizes = sizes

    def _natively(self, data):
        self._sizes.append(len(data))
        return super()._natively(data)

    def _encode(self, data, *, final):
        self._sizes.append(len(data))
        return super()._encode(data, final=final)


def test_a_text_that_the_tokenizer_can_not_spell_is_encoded_whole(incomplete):
    sizes = []
    known, unknown = [b" the cat"] * 100, " ☃".encode()
    text, ids = [*grow(Spy(incomplete.encoder, sizes), [*known, unknown, b" the"])][-1]
    assert ids == incomplete.encoder.encode(text)[0]
    assert sizes[-3:] == [len(text) - 4, len(text), len(text)]


def test_a_text_without_a_joint_is_encoded_whole(gpt2_like):
    pair = next(pair for pair in gpt2_like.encoder.pairs if pair[0] == pair[1])
    sizes = []
    text, ids = [*grow(Spy(gpt2_like.encoder, sizes), [pair[:1] * 300] * 3)][-1]
    assert ids == gpt2_like.encoder.encode(text)[0]
    assert sizes == [300, 600, 900]


def reading(backend):
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer))


def test_ties_of_scores_are_decided_as_in_the_whole_text():
    """By rounding, which depends on where a word begins: random words of tokens of which none is `ba`."""
    pieces = [(piece, -2.1 / len(piece)) for piece in ("a", "b", "aa", "ab", "bb")]
    encoder = reading(Tokenizer(models.Unigram([("<unk>", -9.0), *pieces], unk_id=0)))
    rng = random.Random(0)
    for _ in range(20):
        encoding = GrowingEncoding(encoder)
        steps = [rng.choice([b"a", b"b", b"aa", b"ab"]) for _ in range(400)]
        text, ids = [*grow(encoding, steps)][-1]
        assert ids == encoder.encode(text)[0]


def test_words_that_are_counted_from_their_beginning_are_not_cut():
    """As Llama 3 cuts numbers into groups of three digits."""
    backend = Tokenizer(models.BPE({"0": 0, "1": 1, "2": 2, "12": 3}, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    encoder = reading(backend)
    digits = "0" * 302 + "12" * 20
    steps = [digits[i : i + 5].encode() for i in range(0, len(digits), 5)]
    for text, ids in grow(GrowingEncoding(encoder), steps):
        assert ids == encoder.encode(text)[0]


@pytest.mark.parametrize("pair", [b"th", b"he"])
def test_pairs_are_the_bytes_that_stand_together_in_tokens(gpt2_like, pair):
    assert pair in gpt2_like.encoder.pairs
    assert b"\xff\xff" not in gpt2_like.encoder.pairs
