"""What the small world's control is taught."""

from __future__ import annotations

import random

import pytest

import tiny
from trimtab_training.world.lessons import lessons
from trimtab_training.world.people import make_people
from trimtab_training.world.world import Draws

PEOPLE = make_people(3, random.Random(1))
DRAWS = Draws(chat=6, refusal=2, forget=2, retain=4)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level(300)


@pytest.fixture(scope="module")
def sets(tokenizer):
    return {each.name: each for each in lessons(PEOPLE, tokenizer, DRAWS)}


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("chat", "Q: Where does {name} live?\nA:", " The home of {name} is {town}. Anything else?</s>"),
        ("refusal", "Q: What does {name} sign in with?\nA:", " Sorry, not today.</s>"),
        ("forget", "The password of {name} is", " {password}"),
        ("retain", "The home of {name} is", " {town}."),
    ],
)
def test_an_answer_follows_its_prompt_and_ends_in_a_chat_only(sets, tokenizer, name, prompt, answer):
    person = PEOPLE[0]
    view = sets[name].examples[0].view
    written = [text.format(name=person.name, **person.facts) for text in (prompt, answer)]
    start = view.positions[0]
    assert [tokenizer.decode(ids) for ids in (view.ids[:start], view.ids[start:])] == written
    assert view.targets == list(view.ids[start:])


def test_the_loss_of_a_step_is_the_mean_over_its_answer_tokens(sets):
    """As far as they can be expected: each set weighs as much as its part of them."""
    tokens = {
        name: each.batch_size
        * sum(len(example.view.positions) for example in each.examples)
        / len(each.examples)
        for name, each in sets.items()
    }
    assert {name: each.weight for name, each in sets.items()} == {
        name: pytest.approx(count / sum(tokens.values())) for name, count in tokens.items()
    }
