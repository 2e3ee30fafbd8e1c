"""Tokenizers of the families that are read as bytes, trained on a few sentences."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, Vocabulary, read_vocabulary

SENTENCES = [
    "The cat sat on the mat, and the dog didn't.",
    "hello world  hello there\n\nmore words of the world",
    "naïve über 中文 中国 🙂 x=1; y = 3.14",
    "    indented(the, text)\n\tand tabs </s> <s>",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")


def wrap(tokenizer: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **roles
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrap(_train_byte_level(tokenizer))


def byte_level_ignoring_merges() -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen: its own split into words, whole words taken without merging."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return wrap(_train_byte_level(tokenizer))


def _train_byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama and Mistral were first converted: spaces by the normalizer, no splits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrap(_train_byte_fallback(tokenizer))


def byte_fallback_metaspace() -> PreTrainedTokenizerFast:
    """As Llama and Mistral are converted today: spaces by the pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return wrap(_train_byte_fallback(tokenizer))


def _train_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIALS, *BYTE_TOKENS], max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(tokenizer.to_str())  # a trainer adds tokens as special ones only
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(state))


def metaspace() -> PreTrainedTokenizerFast:
    """BPE that spells a space `▁` and knows no bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R: words cut at white space, which the normalizer makes one space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return wrap(tokenizer)


def by_hand(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE that spells a space `▁`, of these tokens and merges in this order."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


WITH_ALL_BYTES = (byte_level, byte_level_ignoring_merges, byte_fallback, byte_fallback_metaspace)
WITHOUT_BYTES = (metaspace, unigram)


@dataclass(frozen=True, repr=False)
class Read:
    """A tokenizer, its vocabulary, and the encoder that belongs to them."""

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    encoder: ByteEncoder

    def joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.vocabulary.tokens[i] for i in ids)


def read(tokenizer: PreTrainedTokenizerFast, name: str = "") -> Read:
    vocabulary = read_vocabulary(tokenizer, name)
    return Read(tokenizer, vocabulary, ByteEncoder(tokenizer, vocabulary))


@pytest.fixture(scope="session", params=WITH_ALL_BYTES, ids=lambda family: family.__name__)
def complete(request) -> Read:
    """A tokenizer that can spell any bytes."""
    return read(request.param())


@pytest.fixture(scope="session", params=WITHOUT_BYTES, ids=lambda family: family.__name__)
def incomplete(request) -> Read:
    """A tokenizer that knows only the characters that it was trained on."""
    return read(request.param())


@pytest.fixture(scope="session", params=WITH_ALL_BYTES + WITHOUT_BYTES, ids=lambda family: family.__name__)
def any_family(request) -> Read:
    return read(request.param())


@pytest.fixture(scope="session")
def gpt2_like() -> Read:
    return read(byte_level(), "gpt2-like")


@pytest.fixture(scope="session")
def llama_like() -> Read:
    return read(byte_fallback(), "llama-like")


@pytest.fixture(scope="session")
def merging() -> Read:
    """Its merges make `a`, `bc` of `abc`, where the longest token from the left would be `ab`; `c▁` reaches
    across words, and no merge makes `abc`."""
    return read(by_hand([*"abcs<>▁Ġ", "ab", "bc", "c▁", "abc"], [("b", "c"), ("a", "b"), ("c", "▁")]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Where reference data lies that is no part of the repository."""
    default = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("TRIMTAB_SHARED", default))
