"""Questions come from files of three kinds or stand in the recipe; a wrong record is told by its number."""

from __future__ import annotations

import pytest

from trimtab_training.evaluation.questions import load_group, load_questions
from trimtab_training.evaluation.recipe import EvalRecipe, Group, Question
from trimtab_training.recipe_file import RecipeError, read_recipe

RECORDS = (Question(question="Where?", answer=("Here", "There")), Question(prompt="It is", answer=("here",)))


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "Where?", "answer": ["Here", "There"]}\n\n{"prompt": "It is", "answer": "here"}\n',
        '[{"question": "Where?", "answer": ["Here", "There"]}, {"prompt": "It is", "answer": "here"}]',
        "- question: Where?\n  answer: [Here, There]\n- {prompt: It is, answer: here}\n",
    ],
)
def test_a_file_of_records(tmp_path, text):
    file = tmp_path / "questions"
    file.write_text(text, encoding="utf-8")
    assert load_questions(file) == list(RECORDS)


def test_records_in_the_recipe():
    group = Group(name="g", questions=["Where?", {"question": "Who?", "answer": "me"}], scores="refuses")
    assert [question.text for question in load_group(group).questions] == ["Where?", "Who?"]
    assert group.scores == ("refuses",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no records"),
        ("[]", "has no records"),
        ("question: x", "must hold a list of records, got dict"),
        ("a: [", "is neither JSON Lines nor a JSON or YAML list"),
        ('{"question": "x"}\n{"question', "line 2 is not JSON"),
        ('{"question": "x"}\n{"quest": "x"}', "record 2, `quest`: Extra inputs"),
        (
            "- {question: x, prompt: y}",
            "record 1: a record needs one of `question`, `messages` and `prompt`, got",
        ),
        ("- {answer: x}", "got none of them"),
        ("- 3", "record 1: Input should be a valid dict"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    file = tmp_path / "questions"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="`questions`: ") as caught:
        load_questions(file)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"`questions`: .*none can't be read"):
        load_questions(tmp_path / "none")


def test_a_score_that_needs_an_answer():
    group = Group(name="g", questions=[{"question": "Who?", "answer": "me"}, "Where?"], scores=["contains"])
    with pytest.raises(RecipeError, match=r"group 'g': question 2 \('Where\?'\) has no `answer`, which"):
        load_group(group)


def recipe(**changes) -> EvalRecipe:
    keys = {
        "target": "{model_name_or_path: m}",
        "control": "c",
        "groups": "[{name: g, questions: [a], scores: refuses}]",
        "output_dir": "out",
    }
    options = [word for key, value in (keys | changes).items() if value for word in (f"--{key}", value)]
    return read_recipe(EvalRecipe, None, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": ""}, "`control` is missing: `strengths` other than 0 need a control"),
        ({"groups": ""}, "`groups` and `tofu` are missing: there is nothing to ask"),
        ({"strengths": "[0, 1, 1]"}, "`strengths`: 1.0 is listed twice"),
        ({"strengths": "[]"}, "`strengths`: Value should have at least 1 item"),
        ({"strengths": "11"}, "`strengths.0`: Input should be less than or equal to 10"),
        ({"routings": "[paths]"}, "`routings.0`: Input should be 'pm-mined', 'path' or 'pieces', got"),
        ({"groups": "[{name: g, questions: [], scores: refuses}]"}, "there are no questions"),
        ({"groups": "[{name: g, questions: [a], scores: refuse}]"}, "`groups.0.scores.0`: Input should be"),
        ({"groups": "[{name: g, questions: [a], score: refuses}]"}, "Did you mean `scores`?"),
        ({"gateway": "localhost:8000"}, "`gateway`: String should match pattern"),
        (
            {"gateway": "http://g/v1", "tofu": "{path: x}"},
            "`tofu` needs log-likelihoods, which a gateway does not give: leave `gateway` out",
        ),
        (
            {"gateway": "http://g/v1", "target": "{model_name_or_path: m, chat_template: x}"},
            "`target.chat_template` has no effect with `gateway`",
        ),
        ({"max_new_token": "3"}, "Did you mean `max_new_tokens`?"),
        ({"output_dir": ""}, "`output_dir` is missing"),
    ],
)
def test_a_recipe_that_is_wrong(changes, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert message in str(caught.value)


def test_two_groups_of_one_name():
    group = "{name: g, questions: [a], scores: refuses}"
    with pytest.raises(RecipeError, match="`groups`: 'g' is listed twice"):
        recipe(groups=f"[{group}, {group}]")


def test_without_control_only_the_target_is_asked():
    assert recipe(control="", strengths="0").control is None


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "a\u2028b"}\n{"question": "c"}\n', encoding="utf-8")
    assert [each.question for each in load_questions(tmp_path / "q.jsonl")] == ["a\u2028b", "c"]
