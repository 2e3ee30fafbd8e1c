"""Special tokens of the same name are counterparts; what ends a generation goes by its role first."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import load_vocabulary, read_vocabulary
from trimtab_mappings.special_tokens import counterparts

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
)
REAL_MODELS = Path.home() / ".cache/trimtab-real-models"


def vocabulary_of(read, *tokens, template=None, ends=(), **roles):
    """The same tokens with other special ones, in the order of `tokens`; `ends`: of the generation config."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([*tokens])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": token for role, token in roles.items()}
    )
    tokenizer.chat_template = template
    return read_vocabulary(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids([*ends]))


def by_name(target, control):
    """The counterparts of two vocabularies, as names."""
    names = control.names | {-1: None}
    return {target.names[i]: names[own] for i, own in counterparts(target, control).items()}


def qwen_like(read):
    return vocabulary_of(
        read,
        TEXT_END,
        START,
        END,
        template=TEMPLATE,
        bos=TEXT_END,
        pad=TEXT_END,
        eos=END,
        ends=[END, TEXT_END],
    )


def smollm_like(read):
    return vocabulary_of(
        read, START, END, TEXT_END, template=TEMPLATE, bos=START, eos=END, unk=TEXT_END, pad=END
    )


def test_the_same_name_comes_before_bos_unk_and_pad(gpt2_like, llama_like):
    qwen, smollm = qwen_like(gpt2_like), smollm_like(llama_like)
    expected = {START: START, END: END, TEXT_END: TEXT_END}
    for target, control in ((qwen, smollm), (smollm, qwen)):
        found = by_name(target, control)
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("role", ["bos", "unk", "pad"])
def test_a_role_counts_where_no_name_is_the_same(gpt2_like, llama_like, role):
    target = vocabulary_of(gpt2_like, "<|a|>", **{role: "<|a|>"})
    control = vocabulary_of(llama_like, "<|b|>", **{role: "<|b|>"})
    assert by_name(target, control)["<|a|>"] == "<|b|>"


def test_an_end_of_the_same_name_counts_where_the_control_has_no_template(gpt2_like, llama_like):
    target = vocabulary_of(gpt2_like, END, TEXT_END, template=TEMPLATE, eos=END)
    control = vocabulary_of(llama_like, TEXT_END, END, eos=END, ends=[END, TEXT_END])
    assert control.turn_end is None
    assert by_name(target, control)[END] == END


def test_ends_of_the_same_name_count_where_the_target_has_no_template(gpt2_like, llama_like):
    target = vocabulary_of(gpt2_like, TEXT_END, END, eos=END, ends=[END, TEXT_END])
    control = vocabulary_of(llama_like, END, TEXT_END, template=TEMPLATE, eos=TEXT_END)
    found = by_name(target, control)
    assert (found[END], found[TEXT_END]) == (END, TEXT_END)


def test_an_end_of_turn_maps_to_the_control_s_though_another_token_has_its_name(gpt2_like, llama_like):
    stop = TEMPLATE.replace(END, "<|stop|>")
    target = vocabulary_of(gpt2_like, START, END, template=TEMPLATE, eos=END)
    control = vocabulary_of(llama_like, START, "<|stop|>", END, template=stop, eos="<|stop|>")
    found = by_name(target, control)
    assert (found[START], found[END]) == (START, "<|stop|>")


def test_real_vocabularies_keep_their_names():
    if not REAL_MODELS.is_dir():
        pytest.skip("needs Qwen2.5-Coder's and SmolLM2's tokenizers in ~/.cache/trimtab-real-models")
    qwen, smollm = (load_vocabulary(str(REAL_MODELS / name)) for name in ("qwen2.5-coder", "smollm2"))
    for target, control in ((qwen, smollm), (smollm, qwen)):
        found = by_name(target, control)
        assert {name: found[name] for name in (START, END, TEXT_END)} == {
            n: n for n in (START, END, TEXT_END)
        }
