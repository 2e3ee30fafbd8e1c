"""Greedy answers under a control, held against the slow reference of the tests."""

from __future__ import annotations

import json

import pytest

from reference import Model, PathReference, Reference
from trimtab_processors.pack import Component, Pack
from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.offline import Asked, Offline, cut
from trimtab_training.evaluation.recipe import Question, TargetSettings
from trimtab_training.evaluation.target import load_target
from trimtab_training.recipe_file import RecipeError

TOKENS = 12
CHATS = [Question(question=text) for text in ("Bako?", "Litu mavo dera pinu zolo.", "x=1")]
SETTINGS = [Setting(0.0, None), Setting(1.0, "path"), Setting(1.5, "pm-mined"), Setting(1.5, "path")]


def loaded(location, **settings):
    return load_target(TargetSettings(model_name_or_path=str(location), **settings))


def offline(location, control, tables, **changes) -> Offline:
    target = loaded(location)
    steering = control and LoadedControl(str(control), target, tables)
    return Offline(target, steering, **{"max_new_tokens": TOKENS, "batch_size": 5} | changes)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_answers_are_those_of_the_reference(family, tables, name):
    """In its own vocabulary and in foreign ones, by both routings, prompts of unequal lengths together."""
    asker = offline(family.targets[name], family.control, tables)
    answers = asker.answers(CHATS, SETTINGS)
    target, control = Model(family.targets[name]), Model(family.control)
    slow = {"pm-mined": Reference(target, control), "path": PathReference(target, control), None: None}
    slow[None] = slow["path"]
    for setting, texts in zip(SETTINGS, answers, strict=True):
        assert texts == [greedy(slow[setting.routing], chat, setting.strength) for chat in CHATS]
    different = {tuple(texts) for texts in answers}
    assert len(different) == len(SETTINGS) - (name == "a")  # whose routings are one


def greedy(reference: Reference, question: Question, strength: float) -> str:
    prompts = [
        model.tokenizer.apply_chat_template(
            question.chat(None), add_generation_prompt=True, return_dict=False
        )
        for model in (reference.target, reference.control)
    ]
    tokens: list[int] = []
    for _ in range(TOKENS):
        *_, step = reference.steps(*prompts, strength, [*tokens, 0])
        if step.token == reference.target.tokenizer.eos_token_id:
            break
        tokens.append(step.token)
    return reference.target.tokenizer.decode(tokens, skip_special_tokens=True)


def test_answers_do_not_depend_on_the_batch(family, tables):
    alone = offline(family.b, family.control, tables, batch_size=1).answers(CHATS, SETTINGS)
    assert offline(family.b, family.control, tables, batch_size=64).answers(CHATS, SETTINGS) == alone


def test_a_pack_of_two_models_is_their_weighted_sum(family, tables, tmp_path):
    """Two halves are the whole."""
    halves = tmp_path / "halves"
    halves.mkdir()
    Pack(components=(Component(model=str(family.control), weight=0.5),) * 2).save(halves)
    whole = offline(family.b, family.control, tables).answers(CHATS, SETTINGS)
    assert offline(family.b, halves, tables).answers(CHATS, SETTINGS) == whole


def test_what_the_control_holds_is_given_back(family, tables):
    asker = offline(family.b, family.control, tables)
    asker.answers(CHATS, SETTINGS)
    (control,) = asker.control.runtime.controls
    assert control.parts[0].model.pool.used == 0


def test_raw_text_is_continued_without_a_template(family, tables):
    """The control reads the text of the target's prompt."""
    asker = offline(family.b, family.control, tables)
    question = Question(prompt="Bako litu")
    reference = Reference(Model(family.b), Model(family.control))
    prompts = [each.tokenizer("Bako litu").input_ids for each in (reference.target, reference.control)]
    step, *_ = reference.steps(*prompts, 1.5, [0])
    (answer,), _ = asker.answers([question], [Setting(1.5, "pm-mined"), Setting(0.0, None)])
    assert answer.startswith(reference.target.tokenizer.decode([step.token]))


def test_a_generation_config_does_not_change_what_is_likeliest(family, tables, tmp_path):
    """Some models come with a penalty on repetition: it would be part of what is measured."""
    penalized = tmp_path / "penalized"
    penalized.mkdir()
    for file in family.b.iterdir():
        (penalized / file.name).write_bytes(file.read_bytes())
    config = json.loads((penalized / "generation_config.json").read_text())
    (penalized / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 5.0}))
    plain = [Setting(0.0, None)]
    assert offline(penalized, None, tables).answers(CHATS, plain) == offline(family.b, None, tables).answers(
        CHATS, plain
    )


def test_answers_end_at_any_end_token_of_the_generation_config(family, tables, tmp_path):
    ending = tmp_path / "ending"
    ending.mkdir()
    for file in family.b.iterdir():
        (ending / file.name).write_bytes(file.read_bytes())
    asker = offline(family.b, None, tables)
    prompt = asker.target.encode(CHATS[0])
    (tokens,) = asker.generate([Asked(prompt, None, SETTINGS[0])])
    config = json.loads((ending / "generation_config.json").read_text())
    own = config["eos_token_id"]
    (ending / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [own, tokens[3]]}))
    (shorter,) = offline(ending, None, tables).generate([Asked(prompt, None, SETTINGS[0])])
    assert shorter == tokens[: tokens.index(tokens[3])]


def test_a_stop_string_ends_an_answer():
    assert cut("One. Two? Three", ["?", ". "]) == "One"
    assert cut("One", ["?"]) == "One"
    assert cut("One", []) == "One"


def test_a_system_prompt_is_part_of_both_prompts(family, tables):
    plain = offline(family.b, family.control, tables).answers(CHATS, SETTINGS)
    told = offline(family.b, family.control, tables, system_prompt="Zolo!").answers(CHATS, SETTINGS)
    assert all(left != right for left, right in zip(plain, told, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "./none"}, "`target.model_name_or_path`: './none' can't be loaded"),
        ({"device": "gpu"}, "`target.device`: 'gpu' can't be used"),
        ({"chat_template": "none.jinja"}, r"`target.chat_template`: none\.jinja can't be read"),
    ],
)
def test_a_target_that_cannot_be_had(family, settings, message):
    with pytest.raises(RecipeError, match=message):
        loaded(settings.pop("model_name_or_path", family.b), **settings)


def test_a_chat_template_is_text_or_a_file(family, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("Q: {{ messages[0].content }} A:", encoding="utf-8")
    target = loaded(family.b, chat_template=str(file))
    assert target.encode(CHATS[0]) == target.tokenizer("Q: Bako? A:", add_special_tokens=False).input_ids
    again = loaded(family.b, chat_template="Q: {{ messages[0].content }} A:")
    assert again.encode(CHATS[0]) == target.encode(CHATS[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "`target.chat_template` is missing"),
        ("{{ x.y.z }}", "`target.chat_template` can't render 'Bako"),
    ],
)
def test_a_conversation_that_cannot_be_rendered(family, template, message):
    target = loaded(family.b, chat_template=template)
    target.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=message):
        target.encode(CHATS[0])


def test_a_prompt_that_does_not_fit(family, tables):
    with pytest.raises(RecipeError, match=r"`max_new_tokens`: 'Bako.*exceeds the target's context of 256"):
        offline(family.b, None, tables, max_new_tokens=250).answers(CHATS[:1], [Setting(0.0, None)])


def test_a_control_that_cannot_be_had(family, tables, tmp_path):
    with pytest.raises(RecipeError, match=r"`control`: .*none"):
        offline(family.b, tmp_path / "none", tables)
