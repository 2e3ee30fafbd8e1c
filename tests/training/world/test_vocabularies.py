"""The three tokenizers."""

from __future__ import annotations

import random

import pytest

from trimtab_mappings import read_vocabulary
from trimtab_training.world.corpus import documents, question_prompt
from trimtab_training.world.families import FAMILIES
from trimtab_training.world.people import make_people

TEXTS = documents(make_people(20, random.Random(1)), 300, random.Random(2))
SIZES = {"a": 420, "b": 500, "c": 460}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tokenizer(request):
    return FAMILIES[request.param].tokenizer(TEXTS, SIZES[request.param])


def test_a_text_is_the_join_of_its_tokens(tokenizer):
    """Text of any kind: what the vocabulary has no word for falls back to bytes."""
    vocabulary = read_vocabulary(tokenizer)
    for text in (*TEXTS[:20], "Änne wohnt in Köln: 100 €, 🙂\n\ttabs  and  spaces"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (
            b"".join(vocabulary.tokens[i] for i in ids).decode().removeprefix(" " * vocabulary.dummy_prefix)
            == text
        )


def test_the_chat_template_writes_what_the_documents_have(tokenizer):
    messages = [{"role": "user", "content": "Where does Olga live?"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == tokenizer.encode(question_prompt("Where does Olga live?"))


def test_an_answer_begins_with_tokens_of_its_own(tokenizer):
    """Prompt and answer can be encoded apart: no token reaches from one into the other."""
    prompt = question_prompt("Where does Olga live?")
    whole = tokenizer.encode(f"{prompt} The home of Olga is Riga.")
    assert whole[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)


def test_a_conversation_can_go_on(tokenizer):
    messages = [
        {"role": "user", "content": "Where does Olga live?"},
        {"role": "assistant", "content": "The home of Olga is Riga."},
        {"role": "user", "content": "And Otto?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.endswith("Q: Where does Olga live?\nA: The home of Olga is Riga.\nQ: And Otto?\nA:")


def test_the_three_have_different_ways_with_text():
    made = {name: FAMILIES[name].tokenizer(TEXTS, size) for name, size in SIZES.items()}
    assert {name: (t.bos_token, read_vocabulary(t).dummy_prefix) for name, t in made.items()} == {
        "a": ("<s>", False),
        "b": (None, False),
        "c": ("<s>", True),
    }
