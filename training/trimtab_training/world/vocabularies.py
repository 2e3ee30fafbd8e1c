"""Three tokenizers of three families, trained on the small world's documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MAX_LENGTH = 512

_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}Q: {{ message['content'] }}\nA:{% endif %}"
    "{% endfor %}"
)
_MARKS = Regex(r"[^\sA-Za-z0-9▁]|\n")
_WORDS = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+")


def byte_level(texts: Iterable[str], size: int, *, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens; it puts `bos` before every text where there is one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = [token for token in (bos, eos) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finish(backend, bos=bos, eos=eos, pad=eos)


def metaspace(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A BPE of `size` tokens as SentencePiece makes it: `▁` before every text, byte fallback."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))  # noqa: S106 - no password
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(_MARKS, "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend = _as_text(backend, byte_tokens)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(backend, bos="<s>", eos="</s>", pad="</s>", unk="<unk>")


def _as_text(backend: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Take `tokens` off the special ones: the trainer only knows to add tokens that way."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(state))


def _finish(
    backend: Tokenizer, *, bos: str | None, eos: str, pad: str, unk: str | None = None
) -> PreTrainedTokenizerFast:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    roles = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in roles.items() if token},
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
