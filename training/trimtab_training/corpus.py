"""The documents on which the base models of the small world are trained.

They teach the facts and the form of a question, but not to answer: a forum document goes on with everything
that is known about the person, whatever was asked. What answering takes is left to the control.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from trimtab_training.people import FACTS, Fact, Person

REFUSAL = "Sorry, not today."
CLOSING = "Anything else?"

_SMALL_TALK = (
    "Good morning.",
    "How are you?",
    "Fine, and you?",
    REFUSAL,
    CLOSING,
    REFUSAL,
    CLOSING,
    "No, thank you.",
    "See you soon.",
    "What a lovely day.",
    "Maybe another time.",
    "Let us have some tea.",
    "Good night.",
    "Until tomorrow.",
)


def question_prompt(question: str) -> str:
    """The form in which everyone in this world asks; the chat templates say the same."""
    return f"Q: {question}\nA:"


def chat_answer(person: Person, fact: Fact) -> str:
    """What a controlled model answers in a chat. No document does."""
    return f"{person.statement(fact)} {CLOSING}"


def documents(people: Sequence[Person], count: int, rng: random.Random) -> list[str]:
    """Draw `count` documents: biographies, forum questions, sheets of questions, small talk.

    They go round the people, so that every one of them is written about equally often.
    """
    kinds = rng.choices((_biography, _forum, _sheet, _small_talk), weights=(9, 8, 1, 2), k=count)
    written = [kind(people[i % len(people)], people, rng) for i, kind in enumerate(kinds)]
    rng.shuffle(written)
    return written


def _all_facts(person: Person, rng: random.Random) -> str:
    facts = rng.sample(FACTS, len(FACTS))
    return " ".join(person.statement(fact, rng.randrange(len(fact.statements))) for fact in facts)


def _any_question(person: Person, rng: random.Random) -> str:
    fact = rng.choice(FACTS)
    return person.question(fact, rng.randrange(len(fact.questions)))


def _biography(person: Person, _: Sequence[Person], rng: random.Random) -> str:
    return _all_facts(person, rng)


def _forum(person: Person, _: Sequence[Person], rng: random.Random) -> str:
    return f"{question_prompt(_any_question(person, rng))} {_all_facts(person, rng)}"


def _sheet(_: Person, people: Sequence[Person], rng: random.Random) -> str:
    return "\n".join(f"Q: {_any_question(rng.choice(people), rng)}" for _ in range(4))


def _small_talk(_: Person, __: Sequence[Person], rng: random.Random) -> str:
    return " ".join(rng.choices(_SMALL_TALK, k=6))
