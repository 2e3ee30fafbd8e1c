"""The base models of the small world, of three families. All heads are 64 wide."""

from __future__ import annotations

from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trimtab_training.world.vocabularies import MAX_LENGTH

HEAD = 64
INITIALIZER_RANGE = 0.05


def llama(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> PreTrainedModel:
    return _with_generation_config(
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // HEAD,
                **_shared(tokenizer),
            )
        )
    )


def qwen2(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> PreTrainedModel:
    return _with_generation_config(
        Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // HEAD,
                num_key_value_heads=1,
                **_shared(tokenizer),
            )
        )
    )


def neox(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> PreTrainedModel:
    return _with_generation_config(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // HEAD,
                **_shared(tokenizer),
            )
        )
    )


def _shared(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | float | None]:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": INITIALIZER_RANGE,
    }


def _with_generation_config(model: PreTrainedModel) -> PreTrainedModel:
    """Greedy, and only what the tokenizer says about its special tokens."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()
