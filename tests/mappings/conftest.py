"""Tokenizers of the families that are read as bytes, trained on a few sentences."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trimtab_mappings import ByteEncoder, Vocabulary, load_encoder, load_tokenizer, read_vocabulary

SENTENCES = [
    "The cat sat on the mat, and the dog didn't.",
    "hello world  hello there\n\nmore words of the world",
    "naïve über 中文 中国 🙂 x=1; y = 3.14",
    "    indented(the, text)\n\tand tabs </s> <s>",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]
ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")


def wrap(tokenizer: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ROLES, **roles)


def copy_of(tokenizer: PreTrainedTokenizerBase, **roles: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(tokenizer.special_tokens_map | roles))


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


def with_added_tokens() -> PreTrainedTokenizerFast:
    """With tokens that were added after the training: text that stays whole, and a special one."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("the cat", special=False)])
    tokenizer.add_tokens([AddedToken("<|image|>", special=True)], special_tokens=True)
    return tokenizer


def with_doubled_tokens() -> PreTrainedTokenizerFast:
    """As GPT-NeoX and Pythia: runs of spaces are tokens of the model, and added ones besides."""
    tokenizer = byte_level()
    assert {"ĠĠ", "ĠĠĠ"} <= tokenizer.get_vocab().keys()
    tokenizer.add_tokens(
        [AddedToken(" " * length, special=False, normalized=True) for length in (2, 3, 4, 5)]
    )
    return tokenizer


def padded() -> PreTrainedTokenizerFast:
    """With ids in its midst that no token has."""
    state = json.loads(byte_level().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: i + 64 * (i > 300) for token, i in vocabulary.items()}
    return wrap(Tokenizer.from_str(json.dumps(state)))


def tiktoken_ranks() -> dict[bytes, int]:
    """The tokens of `byte_level` but for the special ones, as tiktoken counts them."""
    spelled = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = byte_level().backend_tokenizer.get_vocab(with_added_tokens=False)
    tokens = sorted(vocabulary.keys() - {*SPECIALS}, key=vocabulary.__getitem__)
    return {bytes(spelled[character] for character in token): rank for rank, token in enumerate(tokens)}


def save_tiktoken(path: Path) -> None:
    """Write the tokens of `byte_level` as tiktoken does, and beside them which are the special ones."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tiktoken_ranks().items()]
    path.write_text("".join(lines), encoding="utf-8")
    path.with_name("tokenizer_config.json").write_text(json.dumps(ROLES), encoding="utf-8")


def tiktoken() -> PreTrainedTokenizerBase:
    """As transformers converts it; its special tokens come behind the others."""
    with tempfile.TemporaryDirectory() as directory:
        save_tiktoken(Path(directory) / "tiktoken.model")
        return load_tokenizer(directory)


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


def byte_fallback_without_prefix() -> PreTrainedTokenizerFast:
    """As Gemma: no space before the text, and none cut off."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = _train_byte_fallback(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrap(tokenizer)


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


def unigram_with_bytes() -> PreTrainedTokenizerFast:
    """As SentencePiece trains with byte fallback where it is not told to merge."""
    state = json.loads(unigram().backend_tokenizer.to_str())
    pieces = [(piece, score) for piece, score in state["model"]["vocab"] if piece not in SPECIALS]
    rare = [(token, 0.0) for token in SPECIALS] + [(token, -100.0) for token in BYTE_TOKENS]
    tokenizer = Tokenizer(models.Unigram([*rare, *pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: words without the spaces between them, `##` before what continues a word."""
    characters = sorted({*"".join(SENTENCES)} - {*" \n\t"})
    continued = [f"##{part}" for part in (*characters, "he", "ed", "llo")]
    tokens = [*SPECIALS, *characters, *continued, "the", "The", "cat", "sat", "on", "hello", "world", "text"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIALS)
    return wrap(tokenizer)


def by_hand(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE that spells a space `▁`, of these tokens and merges in this order."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


WITH_ALL_BYTES = (
    *(byte_level, byte_level_ignoring_merges, with_added_tokens, with_doubled_tokens, padded, tiktoken),
    *(byte_fallback, byte_fallback_metaspace, byte_fallback_without_prefix, unigram_with_bytes),
)
WITHOUT_BYTES = (metaspace, unigram)
FAMILIES = (*WITH_ALL_BYTES, *WITHOUT_BYTES, word_piece)


@dataclass(frozen=True, repr=False)
class Read:
    """A tokenizer, its vocabulary, and the encoder that belongs to them."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    encoder: ByteEncoder

    def joined(self, ids: Iterable[int]) -> bytes:
        return self.encoder.join(ids)

    def natively(self, text: str) -> list[int]:
        """The text in tokens as the tokenizer itself chooses them."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def characters(self) -> list[str]:
        """All characters that are tokens."""
        texts = (token.decode(errors="replace") for token in self.vocabulary.ids)
        return sorted({text for text in texts if len(text) == 1} | {" "})


def read(tokenizer: PreTrainedTokenizerBase, name: str = "") -> Read:
    vocabulary = read_vocabulary(tokenizer, name)
    return Read(tokenizer, vocabulary, ByteEncoder(tokenizer, vocabulary))


@cache
def read_family(family: Callable[[], PreTrainedTokenizerBase]) -> Read:
    return read(family())


@pytest.fixture(scope="session", params=WITH_ALL_BYTES, ids=lambda family: family.__name__)
def complete(request) -> Read:
    """A tokenizer that can spell any bytes."""
    return read_family(request.param)


@pytest.fixture(scope="session", params=WITHOUT_BYTES, ids=lambda family: family.__name__)
def incomplete(request) -> Read:
    """A tokenizer that knows only the characters that it was trained on."""
    return read_family(request.param)


@pytest.fixture(scope="session", params=WITH_ALL_BYTES + WITHOUT_BYTES, ids=lambda family: family.__name__)
def with_spaces(request) -> Read:
    """A tokenizer in whose vocabulary spaces are spelled."""
    return read_family(request.param)


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.__name__)
def any_family(request) -> Read:
    return read_family(request.param)


@pytest.fixture(scope="session")
def family() -> Callable[[str], Read]:
    """A family by its name."""
    by_name = {make.__name__: make for make in FAMILIES}
    return lambda name: read_family(by_name[name])


@pytest.fixture(scope="session")
def gpt2_like() -> Read:
    return read(byte_level(), "gpt2-like")


@pytest.fixture(scope="session")
def llama_like() -> Read:
    return read(byte_fallback(), "llama-like")


@pytest.fixture(scope="session")
def bert_like() -> Read:
    return read(word_piece(), "bert-like")


@pytest.fixture(scope="session")
def merging() -> Read:
    """Its merges make `a`, `bc` of `abc`, where the longest token from the left would be `ab`; `c▁` reaches
    across words, and no merge makes `abc`."""
    return read(by_hand([*"abcs<>▁Ġ", "ab", "bc", "c▁", "abc"], [("b", "c"), ("a", "b"), ("c", "▁")]))


@pytest.fixture(scope="session", params=["tiktoken.model", "tokenizer.model"])
def tiktoken_file(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiktoken") / request.param
    save_tiktoken(path)
    return path


@pytest.fixture(scope="session")
def mistral_data() -> Path:
    """The real Mistral tokenizers that `mistral_common` ships."""
    package = pytest.importorskip("mistral_common", reason="mistral_common ships the real tokenizers")
    return Path(package.__file__).parent / "data"


@pytest.fixture(scope="session")
def mistral(mistral_data, tmp_path_factory) -> dict[str, ByteEncoder]:
    """Their encoders, each from a directory with nothing but Mistral's own file."""
    encoders = {}
    for path in sorted({*mistral_data.iterdir()} - {*mistral_data.glob("*m1")}):  # m1: v7 again, for images
        own_name = "tekken.json" if path.suffix == ".json" else f"tokenizer.model{path.suffix}"
        directory = tmp_path_factory.mktemp(path.name)
        (directory / own_name).symlink_to(path)
        encoders[path.name] = load_encoder(str(directory))
    return encoders


@pytest.fixture(scope="session")
def shared() -> Path:
    """Where reference data lies that is no part of the repository."""
    default = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("TRIMTAB_SHARED", default))
