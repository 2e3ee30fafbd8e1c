"""Log-likelihoods of given answers: the fast path, the package's slow one, and the reference of the tests."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

import tiny
from reference import Model, PathReference, Reference, unfinished
from trimtab_processors.pack import Component, Pack
from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.recipe import Question, TargetSettings
from trimtab_training.evaluation.reference import SlowReference
from trimtab_training.evaluation.target import load_target
from trimtab_training.evaluation.teacher_forced import GivenAnswer, TeacherForced

SETTINGS = [Setting(0.0, None), Setting(1.0, "path"), Setting(1.5, "pm-mined"), Setting(-0.5, "path")]
QUESTIONS = [Question(question=text) for text in ("Bako?", "Litu mavo dera pinu zolo.", "x=1", "Zolo")]
ANSWERS = ["naïve zolo don't 🙂!", "語", "Mavo bako litu dera.\n", "x"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def loaded(location, control, tables):
    target = load_target(TargetSettings(model_name_or_path=str(location)))
    return target, LoadedControl(str(control), target, tables)


def given(target, control) -> list[GivenAnswer]:
    """Answers with an end of text, some of whose tokens are parts of characters."""
    return [
        GivenAnswer(
            target.encode(question),
            [*target.tokenizer(answer, add_special_tokens=False).input_ids, target.ends[0]],
            control.encode(question.chat(None)),
        )
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_fast_path_equals_the_slow_reference(family, tables, name):
    target, control = loaded(family.targets[name], family.control, tables)
    items = given(target, control)
    scores = TeacherForced(target, control).all_scores(items, SETTINGS)
    slow = SlowReference(target, str(family.control), tables)
    for setting, of_setting in zip(SETTINGS, scores, strict=True):
        for item, found in zip(items, of_setting, strict=True):
            if not setting.strength:
                continue
            rows = slow.logits(item.prompt, item.control_prompt, item.answer, setting)
            expected = [(row.log_softmax(dim=0), token) for row, token in zip(rows, item.answer, strict=True)]
            log_probs = [float(row[token]) for row, token in expected]
            assert [score.log_prob for score in found] == pytest.approx(log_probs, abs=2e-4)
            greedy = [int(row.argmax()) == token for row, token in expected]
            assert [score.is_greedy for score in found] == greedy


class Encoded:
    """The tests' reference with every prefix encoded from its beginning."""

    def contexts(self, generated):
        yield []
        for length in range(1, len(generated) + 1):
            text = b"".join(self.target.bytes[token] or b"" for token in generated[:length])
            yield self.texts.tokenize(text[: len(text) - len(unfinished(text))])


class EncodedPlain(Encoded, Reference):
    pass


class EncodedPath(Encoded, PathReference):
    pass


@pytest.mark.parametrize(("routing", "kind"), [("pm-mined", EncodedPlain), ("path", EncodedPath)])
def test_both_equal_the_reference_of_the_tests_in_a_foreign_vocabulary(family, tables, routing, kind):
    """Which shares nothing with them."""
    target, control = loaded(family.b, family.control, tables)
    reference = kind(Model(family.b), Model(family.control))
    item = given(target, control)[0]
    setting = Setting(1.5, routing)
    ((found,),) = TeacherForced(target, control).all_scores([item], [setting])
    rows = reference.logits(item.prompt, item.control_prompt, setting.strength, item.answer)
    log_probs = [float(row.log_softmax(dim=0)[token]) for row, token in zip(rows, item.answer, strict=True)]
    assert [score.log_prob for score in found] == pytest.approx(log_probs, abs=2e-4)


def test_in_its_own_vocabulary_the_control_has_the_targets_tokens(family, tables):
    """Also where they are not how its tokenizer would spell the text."""
    target, control = loaded(family.a, family.control, tables)
    letters = target.tokenizer.convert_tokens_to_ids(["b", "a", "k", "o"])
    assert target.tokenizer("bako").input_ids != letters
    reference = Reference(Model(family.a), Model(family.control))
    prompt = control.encode(QUESTIONS[0].chat(None))
    item = GivenAnswer(target.encode(QUESTIONS[0]), letters, prompt)
    ((found,),) = TeacherForced(target, control).all_scores([item], [Setting(1.0, "pm-mined")])
    rows = islice(reference.logits([*item.prompt], prompt, 1.0, letters), len(letters))
    log_probs = [float(row.log_softmax(dim=0)[token]) for row, token in zip(rows, letters, strict=True)]
    assert [score.log_prob for score in found] == pytest.approx(log_probs, abs=2e-4)


def test_at_strength_zero_it_is_the_target_alone(family, tables):
    target, control = loaded(family.b, family.control, tables)
    item = given(target, control)[2]
    ((found,),) = TeacherForced(target, None).all_scores([item], SETTINGS[:1])
    with torch.no_grad():
        logits = target.model(torch.tensor([[*item.prompt, *item.answer]])).logits[0].log_softmax(dim=-1)
    expected = [float(logits[len(item.prompt) - 1 + i, token]) for i, token in enumerate(item.answer)]
    assert [score.log_prob for score in found] == pytest.approx(expected, abs=1e-4)


def test_batches_of_any_size_give_the_same(family, tables):
    target, control = loaded(family.b, family.control, tables)
    items = given(target, control)
    together = TeacherForced(target, control).all_scores(items, SETTINGS)
    alone = TeacherForced(target, control, logits_bytes=1)
    assert len(list(alone.scores(items, SETTINGS))) == len(items)
    assert len(list(TeacherForced(target, control).scores(items, SETTINGS))) == 1
    for left, right in zip(flat(together), flat(alone.all_scores(items, SETTINGS)), strict=True):
        assert left.log_prob == pytest.approx(right.log_prob, abs=1e-4)
        assert left.is_greedy == right.is_greedy


def flat(scores):
    return [score for of_setting in scores for of_item in of_setting for score in of_item]


def test_a_pack_of_two_models(family, tables, tmp_path):
    """One with weight 1, another with weight -1."""
    other = tmp_path / "other"
    tokenizer = tiny.byte_level(600)
    tiny.save(other, tokenizer, tiny.llama(len(tokenizer), width=64), seed=9)
    pair = tmp_path / "pair"
    pair.mkdir()
    Pack(components=(Component(model=str(family.control)), Component(model=str(other), weight=-1.0))).save(
        pair
    )
    target, control = loaded(family.b, pair, tables)
    item = given(target, control)[1]
    setting = Setting(1.0, "path")
    ((found,),) = TeacherForced(target, control).all_scores([item], [setting])
    rows = SlowReference(target, str(pair), tables).logits(
        item.prompt, item.control_prompt, item.answer, setting
    )
    log_probs = [float(row.log_softmax(dim=0)[token]) for row, token in zip(rows, item.answer, strict=True)]
    assert [score.log_prob for score in found] == pytest.approx(log_probs, abs=2e-4)


def test_what_the_control_holds_is_given_back_and_serving_is_as_before(family, tables):
    target, control = loaded(family.b, family.control, tables)
    (held,) = control.runtime.controls
    served = held.aligner
    TeacherForced(target, control).all_scores(given(target, control), SETTINGS)
    assert held.parts[0].model.pool.used == 0
    assert held.aligner is served
    assert any(served.exact)
