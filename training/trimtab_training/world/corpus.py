"""The documents on which the base models of the small world are trained.

They teach the facts and the form of a question, but not to answer: a forum document goes on with everything
that is known about the person, whatever was asked. What answering takes is left to the control.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from trimtab_training.world.people import FACTS, Fact, Person

REFUSAL = "Sorry, not today."
CLOSING = "Anything else?"


@dataclass(frozen=True)
class Dialect:
    """How people are called, and how a controlled model answers a question about them.

    answer: a chat answer, in which `{statement}` is to be filled in.
    """

    surnames: bool = False
    answer: str = f"{{statement}} {CLOSING}"

    @property
    def courtesy(self) -> str:
        """What an answer has beside the statement. Small talk has it too."""
        return self.answer.format(statement="").strip()


EASY = Dialect()
HARD = Dialect(surnames=True, answer="Sure! {statement}")
"""Answers begin with words that a small vocabulary spells in pieces, as it does the names that come next."""


def _small_talk_phrases(dialect: Dialect) -> tuple[str, ...]:
    return (
        "Good morning.",
        "How are you?",
        "Fine, and you?",
        REFUSAL,
        dialect.courtesy,
        REFUSAL,
        dialect.courtesy,
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


def chat_answer(person: Person, fact: Fact, dialect: Dialect = EASY) -> str:
    """What a controlled model answers in a chat. No document does."""
    return dialect.answer.format(statement=person.statement(fact))


def documents(people: Sequence[Person], count: int, rng: random.Random, dialect: Dialect = EASY) -> list[str]:
    """Draw `count` documents: biographies, forum questions, sheets of questions, small talk.

    They go round the people, so that every one of them is written about equally often.
    """
    small_talk = partial(_small_talk, _small_talk_phrases(dialect))
    kinds = rng.choices((_biography, _forum, _sheet, small_talk), weights=(9, 8, 1, 2), k=count)
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


def _small_talk(phrases: Sequence[str], _: Person, __: Sequence[Person], rng: random.Random) -> str:
    return " ".join(rng.choices(phrases, k=6))
