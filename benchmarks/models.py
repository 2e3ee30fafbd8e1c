"""Models for benchmarks: the shapes of real ones, random weights, and a tokenizer unlike the target's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from trimtab_mappings import read_vocabulary
from vocabularies import real, train

SHAPES = {
    "target": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "heads": 16},
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "heads": 6},
    "42M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "heads": 2},
}
CONTROLS = ("15M-same", "15M-other", "42M-same", "42M-other")
CONTEXT = 1024  # tokens
VOCABULARY = 32_000  # logits of every model, whatever its tokenizer uses of them
# So that one token in ten of the target's is none of the control's: prose has one in 8 to 20 (docs/LOG.md).
OTHER_TOKENS = 29_600


@dataclass(frozen=True)
class Models:
    """Where a target and its controls are."""

    target: Path
    controls: dict[str, Path]


def make_models(directory: Path, controls: list[str]) -> Models:
    """Make a target and `controls`, which are some of `CONTROLS`: a shape, and whose tokenizer it has."""
    own = real("mistral-v1", directory)
    tokenizers = {"same": own, "other": other_than(own)}
    made = Models(directory / "target", {name: directory / name for name in controls})
    make_model(made.target, "target", own)
    for name, path in made.controls.items():
        shape, tokenizer = name.split("-")
        make_model(path, shape, tokenizers[tokenizer])
    return made


def other_than(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer that has learnt most, but not all, of the tokens of `tokenizer`."""
    tokens = read_vocabulary(tokenizer, "own").tokens
    return train("byte-level", OTHER_TOKENS, [token.decode(errors="ignore") for token in tokens])


def make_model(directory: Path, shape: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a Llama of one of `SHAPES` with random weights, and `tokenizer`."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SHAPES[shape].items() if key != "heads"}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=SHAPES[shape]["heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape != "target",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def token_bytes(shape: str) -> int:
    """Bytes of the keys and values of one token, in float32."""
    return 2 * 4 * SHAPES[shape]["num_hidden_layers"] * SHAPES[shape]["hidden_size"]
