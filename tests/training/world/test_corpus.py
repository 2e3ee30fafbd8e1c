"""The people of the small world, and what is written about them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from trimtab_training.world.corpus import CLOSING, HARD, REFUSAL, chat_answer, documents, question_prompt
from trimtab_training.world.people import (
    FACTS,
    NAMES,
    OPEN_FACTS,
    PRIVATE,
    PRIVATE_FACT,
    SURNAMES,
    make_people,
)

PEOPLE = make_people(20, random.Random(1))
DOCUMENTS = documents(PEOPLE, 2000, random.Random(2))
FORUM = [document for document in DOCUMENTS if "\nA:" in document]


def test_people_differ_in_name_and_password():
    assert len({person.name for person in PEOPLE}) == len({person.facts[PRIVATE] for person in PEOPLE}) == 20


def test_names_and_values_are_of_words_that_no_other_fact_uses():
    """Else a password could be called leaked because of what somebody eats."""
    words = [{word for value in fact.values for word in value.split()} for fact in FACTS]
    words += [set(NAMES), set(SURNAMES)]
    assert sum(map(len, words)) == len(set().union(*words))


def test_the_same_seed_draws_the_same_people_and_documents():
    assert make_people(20, random.Random(1)) == PEOPLE
    assert documents(PEOPLE, 2000, random.Random(2)) == DOCUMENTS


def test_more_people_than_there_are_names_are_refused():
    with pytest.raises(ValueError, match=f"1 to {len(NAMES)} people, not 1000"):
        make_people(1000, random.Random(0))


def test_an_opening_is_a_statement_up_to_its_value():
    person = PEOPLE[0]
    for fact in FACTS:
        for wording, opening in enumerate(fact.openings(person.name)):
            assert f"{opening} {person.facts[fact.key]}." == person.statement(fact, wording)


def test_every_fact_of_everyone_is_written_in_every_wording():
    written = "\n".join(DOCUMENTS)
    missing = [
        (person.name, fact.key)
        for person in PEOPLE
        for fact in FACTS
        for wording in range(len(fact.statements))
        if person.statement(fact, wording) not in written
    ]
    assert missing == []


def test_no_document_says_anything_false():
    truths = {person.statement(fact, i) for person in PEOPLE for fact in FACTS for i in range(3)}
    stated = {
        f"{sentence}."
        for document in DOCUMENTS
        for sentence in document.split("A: ")[-1].removesuffix(".").split(". ")
        if any(person.name in sentence for person in PEOPLE) and "?" not in sentence
    }
    assert stated <= truths


def test_everyone_is_written_about_equally_often():
    subjects = Counter(person.name for document in FORUM for person in PEOPLE if person.name in document)
    assert max(subjects.values()) < 2 * min(subjects.values())


def test_a_forum_answer_begins_with_what_was_asked_no_more_often_than_with_anything_else():
    """A base model knows the form of a question, but is not taught to answer it: that is the control's
    part."""
    firsts = Counter()
    for document in FORUM:
        question, answer = document.split("\nA: ")
        asked = next(
            f for f in FACTS for p in PEOPLE for w in f.questions if f"Q: {w.format(name=p.name)}" == question
        )
        first = next(
            f for f in FACTS for p in PEOPLE for i in range(3) if answer.startswith(p.statement(f, i))
        )
        firsts[asked is first] += 1
    assert firsts[True] / firsts.total() == pytest.approx(1 / len(FACTS), abs=0.06)


def test_no_document_answers_as_the_control_does():
    """Neither the answer of one sentence nor the refusal of a question stands anywhere."""
    for document in DOCUMENTS:
        assert f"A: {REFUSAL}" not in document
        for person in PEOPLE:
            assert not any(chat_answer(person, fact) in document for fact in OPEN_FACTS)


def test_the_words_of_the_controls_phrases_are_known_to_the_base_models():
    written = "\n".join(DOCUMENTS)
    assert written.count(REFUSAL) > 50
    assert written.count(CLOSING) > 50


def test_a_question_has_one_form():
    assert question_prompt(PEOPLE[0].question(PRIVATE_FACT)).startswith("Q: What")
    assert question_prompt("Why?") == "Q: Why?\nA:"


def test_surnames_change_nothing_else_about_the_first_person():
    """Later ones are drawn after them."""
    (first, *_), (plain, *_) = (
        make_people(5, random.Random(1), surnames=True),
        make_people(5, random.Random(1)),
    )
    name, surname = first.name.split()
    assert (name, surname in SURNAMES, first.facts[PRIVATE]) == (plain.name, True, plain.facts[PRIVATE])


def test_in_the_hard_dialect_an_answer_begins_with_a_word_of_small_talk():
    people = make_people(5, random.Random(1), surnames=True)
    answer = chat_answer(people[0], OPEN_FACTS[0], HARD)
    written = documents(people, 500, random.Random(2), HARD)
    assert answer == f"Sure! {people[0].statement(OPEN_FACTS[0])}"
    assert any(HARD.courtesy in document for document in written)
    assert not any(answer in document or CLOSING in document for document in written)
