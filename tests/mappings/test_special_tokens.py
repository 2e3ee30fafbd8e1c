"""Special tokens are found by their roles, by the generation config, and by what a chat template writes."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, build_table, read_vocabulary

PARTS = (
    "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}<|eot|>"
    "{% endfor %}"
)
MIXED = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content[0]['text'] }}"
    "{% else %}{{ message.content + '<|eot|>' }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message, please') }}{% endif %}"
    "{% for message in messages %}{{ message.content }}<|eot|>{% endfor %}"
)
BOTH = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + PARTS


def copy_of(read, **roles):
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(read.tokenizer.special_tokens_map | roles))


def encoder_of(tokenizer):
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer))


@pytest.mark.parametrize("template", [PARTS, MIXED, WITH_SYSTEM, BOTH])
def test_a_template_is_given_messages_in_the_form_that_it_takes(gpt2_like, template):
    tokenizer = copy_of(gpt2_like)
    tokenizer.add_tokens(["<|eot|>"])
    tokenizer.chat_template = template
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.roles["end_of_turn"] == (vocabulary.turn_end,)
    assert tokenizer.convert_ids_to_tokens(vocabulary.turn_end) == "<|eot|>"


def test_an_eos_that_the_template_writes_behind_an_answer_ends_turns(gpt2_like):
    tokenizer = copy_of(gpt2_like)
    tokenizer.chat_template = "{{ messages[-1].content }}</s>"
    vocabulary = read_vocabulary(tokenizer)
    assert (vocabulary.turn_end, vocabulary.roles.get("end_of_turn")) == (2, None)


@pytest.mark.parametrize("role", ["pad", "unk"])
def test_a_token_of_text_that_pads_stays_text(gpt2_like, llama_like, role):
    for read in (gpt2_like, llama_like):
        tokenizer = copy_of(read, **{f"{role}_token": ","})
        comma = tokenizer.convert_tokens_to_ids(",")
        vocabulary = read_vocabulary(tokenizer)
        assert vocabulary.tokens[comma] == b","
        assert comma not in vocabulary.special
        assert comma not in vocabulary.roles.get(role, ())
        encoder = ByteEncoder(tokenizer, vocabulary)
        ids, _ = encoder.encode(b"hello,")
        assert comma in ids
        table = build_table(encoder, encoder)
        assert (table.exact[comma], table.mapping[comma]) == (True, comma)


def test_a_token_of_text_that_ends_a_generation_is_special(gpt2_like):
    tokenizer = copy_of(gpt2_like, eos_token="!", pad_token="!")
    exclamation = tokenizer.convert_tokens_to_ids("!")
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.roles["eos"] == (exclamation,)
    assert vocabulary.tokens[exclamation] == b""


def test_padding_in_brackets_is_special_though_a_unigram_model_would_say_it(family):
    tokenizer = copy_of(family("unigram"), pad_token="<unk>")
    assert read_vocabulary(tokenizer).tokens[0] == b""


def few_letters(unknown=None, **roles):
    """A vocabulary that spells nothing but `a` and `b`, and whose model may have an unknown token."""
    tokens = ["</s>", "<unk>", "<pad>", "a", "b"]
    from tokenizers import decoders

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"eos_token": "</s>", "pad_token": "<pad>"} | roles)
    )


@pytest.mark.parametrize(
    ("unknown", "roles", "expected"),
    [
        ("<unk>", {"unk_token": "<unk>"}, [1]),
        ("<unk>", {}, [1]),
        ("<unk>", {"unk_token": "</s>"}, [1]),
        (None, {"unk_token": "<unk>"}, []),
        (None, {"unk_token": "</s>"}, []),
        ("</s>", {"unk_token": "</s>"}, []),
        ("</s>", {}, []),
        ("<pad>", {"unk_token": "<pad>"}, []),
        ("<unk>", {"unk_token": "<unk>", "bos_token": "<unk>"}, []),
        ("a", {}, []),
    ],
)
@pytest.mark.parametrize("data", ["aéb".encode(), b"a\xffb"])
def test_what_can_not_be_spelled_becomes_the_model_s_unknown_token_or_nothing(unknown, roles, expected, data):
    tokenizer = few_letters(unknown, **roles)
    encoder = encoder_of(tokenizer)
    assert encoder.encode(data)[0] == [3, *expected, 4]
    assert encoder.join(encoder.encode(data)[0]) == b"ab"
    assert encoder.encode_all([data]) == [[3, *expected, 4]]


def test_an_unknown_token_that_is_an_end_has_no_such_role(gpt2_like):
    assert read_vocabulary(copy_of(gpt2_like, unk_token="</s>")).roles.get("unk") is None


def test_special_tokens_that_are_not_marked_as_such_do_not_disturb_the_words_beside_them(gpt2_like):
    tokenizer = copy_of(gpt2_like)
    tokenizer.add_tokens([AddedToken("<|eot|>", special=False)])
    vocabulary = read_vocabulary(tokenizer, eos_ids=[len(tokenizer) - 1])
    ids = ByteEncoder(tokenizer, vocabulary).encode(b"hello<|eot|> world")[0]
    assert ids == gpt2_like.encoder.encode(b"hello<|eot|> world")[0]
