"""The three base models of the small world: tokenizer and architecture of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.world import architectures, vocabularies

MakeTokenizer = Callable[[Sequence[str], int], PreTrainedTokenizerBase]
MakeModel = Callable[[PreTrainedTokenizerBase, int, int], PreTrainedModel]


@dataclass(frozen=True)
class Family:
    """How models of one kind are made, from texts and sizes."""

    tokenizer: MakeTokenizer
    model: MakeModel


def _llama_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerBase:
    return vocabularies.byte_level(texts, size, bos="<s>", eos="</s>")


def _qwen_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerBase:
    return vocabularies.byte_level(texts, size, bos=None, eos="<|endoftext|>")


FAMILIES = {
    "a": Family(_llama_tokenizer, architectures.llama),
    "b": Family(_qwen_tokenizer, architectures.qwen2),
    "c": Family(vocabularies.metaspace, architectures.neox),
}
