"""Tiny tokenizers and models, made on the spot: random weights, so that every token matters and text is
wild."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTROL_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' says ' + message['content'] + '. ' }}"
    "{% endfor %}Then:"
)
SPECIALS = ["<pad>", "<s>", "</s>"]
CONTEXT = 256


def sentences(count: int, seed: int = 0) -> Iterator[str]:
    """Sentences of made-up words, with some accents, Chinese and emoji among them."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfglmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    words += ["é", "naïve", "über", "中文", "語", "🙂", "🚀", "don't", "x=1", "3.14"]
    for _ in range(count):
        yield " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + rng.choice(".!?\n")


def byte_level(size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    return _byte_level(size, seed, pre_tokenizers.ByteLevel(add_prefix_space=False))


def qwen2_byte_level(size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Split as transformers' Qwen2Tokenizer splits, whatever `tokenizer.json` says: each digit alone."""
    digits = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(size, seed, pre_tokenizers.Sequence([digits, encoded]))


def _byte_level(size: int, seed: int, split: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(2000, seed), trainer)
    return _wrap(tokenizer)


def metaspace(size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """BPE in the way of SentencePiece: spaces as ▁, one put before every text, characters but no bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    tokenizer.train_from_iterator(sentences(2000, seed), trainer)
    return _wrap(tokenizer, unk_token="<unk>")


def byte_fallback(size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """As `metaspace`, with a token for every byte, for what has no token of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    plain = (sentence.encode("ascii", "ignore").decode() for sentence in sentences(2000, seed))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", *SPECIALS, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(plain, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    return _wrap(Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def _wrap(tokenizer: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **roles
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def llama(vocab: int, *, width: int = 128, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


def qwen2(vocab: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


def gpt_neox(vocab: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


def save(
    directory: Path, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """Save a model of `config` with random weights, and `tokenizer`, as a Hugging Face directory."""
    kinds = {LlamaConfig: LlamaForCausalLM, Qwen2Config: Qwen2ForCausalLM, GPTNeoXConfig: GPTNeoXForCausalLM}
    torch.manual_seed(seed)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = kinds[type(config)](config).eval()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@dataclass(frozen=True)
class Family:
    """Three targets of different vocabularies and one control that shares the first one's."""

    a: Path
    b: Path
    c: Path
    control: Path

    @property
    def targets(self) -> dict[str, Path]:
        return {"a": self.a, "b": self.b, "c": self.c}


def family(root: Path) -> Family:
    """Make the family; the vocabularies of b and c are padded past their tokenizers."""
    made = Family(root / "a", root / "b", root / "c", root / "control")
    first, second, third = byte_level(600), qwen2_byte_level(900, seed=1), metaspace(700, seed=2)
    save(made.a, first, llama(len(first)), seed=1)
    save(made.b, second, qwen2(len(second) + 12), seed=2)
    save(made.c, third, gpt_neox(len(third) + 4), seed=3)
    first.chat_template = CONTROL_TEMPLATE
    save(made.control, first, llama(len(first), width=64), seed=4)
    return made
