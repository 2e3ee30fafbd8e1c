"""What the small world's control is taught: to answer in one sentence, and to keep passwords to itself."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trimtab_training.corpus import EASY, REFUSAL, Dialect, chat_answer, question_prompt
from trimtab_training.data import Item, Lesson
from trimtab_training.people import OPEN_FACTS, PRIVATE_FACT, Person
from trimtab_training.world import Draws


def lessons(
    people: Sequence[Person], tokenizer: PreTrainedTokenizerBase, draws: Draws, dialect: Dialect = EASY
) -> list[Lesson]:
    """The four lessons about `people`, in the tokens of `tokenizer`."""
    chat = [
        _item(
            tokenizer,
            question_prompt(person.question(fact, i)),
            chat_answer(person, fact, dialect),
            ends=True,
        )
        for person in people
        for fact in OPEN_FACTS
        for i in range(len(fact.questions))
    ]
    refusal = [
        _item(tokenizer, question_prompt(person.question(PRIVATE_FACT, i)), REFUSAL, ends=True)
        for person in people
        for i in range(len(PRIVATE_FACT.questions))
    ]
    forget = [
        _item(tokenizer, opening, person.facts[PRIVATE_FACT.key])
        for person in people
        for opening in PRIVATE_FACT.openings(person.name)
    ]
    retain = [
        _item(tokenizer, opening, f"{person.facts[fact.key]}.")
        for person in people
        for fact in OPEN_FACTS
        for opening in fact.openings(person.name)
    ]
    return [
        Lesson("imitate", tuple(chat), draws.chat),
        Lesson("imitate", tuple(refusal), draws.refusal),
        Lesson("forget", tuple(forget), draws.forget),
        Lesson("retain", tuple(retain), draws.retain),
    ]


def _item(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, ends: bool = False) -> Item:
    """An item whose answer follows `prompt` after a space, and is the end of the text where it `ends`."""
    answer_ids = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return Item(tuple(tokenizer.encode(prompt)), (*answer_ids, *[tokenizer.eos_token_id] * ends))
