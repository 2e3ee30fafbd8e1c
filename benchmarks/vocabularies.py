"""Tokenizers for benchmarks: the real ones that mistral_common ships, and families trained on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trimtab_mappings import load_tokenizer

REAL = {
    "mistral-v1": ("tokenizer.model.v1", "tokenizer.model"),
    "mistral-v3": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model"),
    "tekken": ("tekken_240718.json", "tekken.json"),
    "tekken-2": ("tekken_240911.json", "tekken.json"),
}
_SPECIALS = ["<unk>", "<s>", "</s>"]


def real(name: str, directory: Path) -> PreTrainedTokenizerBase:
    """Load one of `REAL` by way of a model directory below `directory`."""
    source, as_name = REAL[name]
    model = directory / name
    model.mkdir()
    (model / as_name).write_bytes(files("mistral_common").joinpath("data", source).read_bytes())
    return load_tokenizer(str(model))


def train(family: str, size: int, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Train a tokenizer of `FAMILIES` on `texts`."""
    tokenizer, trainer = FAMILIES[family](size)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _byte_level(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _unigram(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=size, special_tokens=_SPECIALS, unk_token="<unk>", show_progress=False
    )


def _word_piece(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=_SPECIALS, show_progress=False
    )


FAMILIES: dict[str, Callable[[int], tuple[Tokenizer, trainers.Trainer]]] = {
    "byte-level": _byte_level,
    "unigram": _unigram,
    "word-piece": _word_piece,
}
