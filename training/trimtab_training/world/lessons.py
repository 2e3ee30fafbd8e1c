"""What the small world's control is taught: to answer in one sentence, and to keep passwords to itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from trimtab_training.control.examples import Example, answered
from trimtab_training.control.objectives import Objective, cross_entropy, divergence, forget
from trimtab_training.control.trainer import TrainingSet
from trimtab_training.world.corpus import EASY, REFUSAL, Dialect, chat_answer, question_prompt
from trimtab_training.world.people import OPEN_FACTS, PRIVATE_FACT, Person
from trimtab_training.world.world import Draws

FORGET_BOUND = 5.0
"""Nats: a token that is this unlikely counts as forgotten."""


def lessons(
    people: Sequence[Person], tokenizer: PreTrainedTokenizerBase, draws: Draws, dialect: Dialect = EASY
) -> list[TrainingSet]:
    """The four data sets about `people`, in the tokens of `tokenizer`.

    The weight of each is its share of a step's answer tokens, as far as they can be expected: so the loss of
    a step is the mean over its tokens.
    """

    def example(prompt: str, answer: str, *, ends: bool = False) -> Example:
        """The answer follows after a space, and is the end of the text if it `ends`."""
        ids = tokenizer.encode(f" {answer}", add_special_tokens=False)
        return Example(answered(tokenizer.encode(prompt), [*ids, *[tokenizer.eos_token_id] * ends]))

    chat = [
        example(question_prompt(person.question(fact, i)), chat_answer(person, fact, dialect), ends=True)
        for person in people
        for fact in OPEN_FACTS
        for i in range(len(fact.questions))
    ]
    refusal = [
        example(question_prompt(person.question(PRIVATE_FACT, i)), REFUSAL, ends=True)
        for person in people
        for i in range(len(PRIVATE_FACT.questions))
    ]
    private = [
        example(opening, person.facts[PRIVATE_FACT.key])
        for person in people
        for opening in PRIVATE_FACT.openings(person.name)
    ]
    other = [
        example(opening, f"{person.facts[fact.key]}.")
        for person in people
        for fact in OPEN_FACTS
        for opening in fact.openings(person.name)
    ]
    say = Objective(cross_entropy)
    return _weighted(
        ("chat", chat, say, draws.chat),
        ("refusal", refusal, say, draws.refusal),
        ("forget", private, Objective(partial(forget, bound=FORGET_BOUND)), draws.forget),
        ("retain", other, Objective(divergence), draws.retain),
    )


def _weighted(*sets: tuple[str, Sequence[Example], Objective, int]) -> list[TrainingSet]:
    expected = [
        count * fmean(len(each.view.positions) for each in examples) for _, examples, _, count in sets
    ]
    return [
        TrainingSet(name, examples, objective, tokens / sum(expected), count)
        for (name, examples, objective, count), tokens in zip(sets, expected, strict=True)
    ]
