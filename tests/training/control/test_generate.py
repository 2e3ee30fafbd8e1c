"""Answers that the template gives itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_mappings import load_tokenizer
from trimtab_training.control.data import complete_data, read_data
from trimtab_training.control.examples import ExampleEncoder
from trimtab_training.control.formats import DataError
from trimtab_training.control.generate import greedy_answers, kept_answers


@pytest.fixture
def model(template):
    return AutoModelForCausalLM.from_pretrained(template, dtype=torch.float32)


def test_answers_are_the_likeliest_tokens_of_each_prompt_alone(model):
    """In batches of prompts of several lengths."""
    prompts = [tuple(range(5, 5 + length)) for length in (3, 9, 4, *range(2, 20))]
    for prompt, answer in zip(prompts, greedy_answers(model, prompts, 7, 0), strict=True):
        ids = list(prompt)
        while len(ids) - len(prompt) < 7:
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == model.generation_config.eos_token_id:
                break
        assert answer == ids[len(prompt) :]


def test_an_answer_ends_with_the_end_of_sequence_token(model):
    """And what is generated behind it, because another prompt of the batch goes on, is left out."""
    (whole,) = greedy_answers(model, [(5, 6, 7)], 5, 0)
    model.generation_config.eos_token_id = [whole[1]]
    first = whole.index(whole[1])
    assert greedy_answers(model, [(5, 6, 7), (9, 9)], 5, 0)[0] == whole[: first + 1]


def test_answers_are_kept_for_the_next_run(tmp_path):
    asked = []

    def generate(prompts, count):
        asked.append((prompts, count))
        return [[1] * count for _ in prompts]

    for fingerprint, count in (("one", 2), ("one", 2), ("two", 2), ("one", 3)):
        answers = kept_answers(tmp_path, fingerprint, generate)([(5, 6)], count)
        assert answers == [[1] * count]
    assert len(asked) == 3


def data_of(recipe, generate):
    tokenizer = load_tokenizer(recipe.template.model_name_or_path)
    encoder = ExampleEncoder(tokenizer, recipe.max_length)
    return tokenizer, complete_data(recipe, read_data(recipe.datasets, encoder), encoder, generate)


@pytest.mark.parametrize(
    ("format_", "row"),
    [
        ("alpaca", '{"instruction": "Bada?"}'),
        ("tofu", '{"question": "Bada?", "answer": "not this one"}'),
        ("messages", '{"messages": [{"role": "user", "content": "Bada?"}]}'),
        (
            "sharegpt",
            '{"conversations": [{"from": "human", "value": "Bada?"}, {"from": "gpt", "value": "No."}]}',
        ),
    ],
)
def test_a_list_of_questions_suffices(make_recipe, tmp_path, format_, row):
    """An answer that the file has is not read."""
    (tmp_path / "q.jsonl").write_text(row)
    given = {
        "path": str(tmp_path / "q.jsonl"),
        "format": format_,
        "objective": "retain",
        "answers": "generate",
    }
    tokenizer, data = data_of(make_recipe(datasets=[given]), lambda prompts, _: [[7, 8, 2] for _ in prompts])
    (example,) = data.sets[0].examples
    assert tokenizer.decode(example.view.ids[:-3]) == "<s>user: Bada?\nassistant:"
    assert example.view.targets == [7, 8, 2]
    assert data.facts[0].answer_tokens == 3


def test_a_teacher_answers_to_its_own_prompt(make_recipe, tmp_path):
    """The control reads the question alone."""
    (tmp_path / "q.jsonl").write_text('{"instruction": "Bada?"}')
    given = {"path": str(tmp_path / "q.jsonl"), "format": "alpaca", "objective": "distill"}
    given |= {"answers": "generate", "max_new_tokens": 5, "teacher": {"system_prompt": "Cefi."}}
    asked = []

    def generate(prompts, count):
        asked.append(count)
        asked.extend(prompts)
        return [[7, 8]]

    tokenizer, data = data_of(make_recipe(datasets=[given]), generate)
    (example,) = data.sets[0].examples
    assert asked[0] == 5
    assert tokenizer.decode(asked[1]) == "<s>system: Cefi.\n<s>user: Bada?\nassistant:"
    assert example.teacher.ids == (*asked[1], 7, 8)
    assert tokenizer.decode(example.view.ids[:-2]) == "<s>user: Bada?\nassistant:"


def test_a_generated_answer_is_cut_at_the_maximum_length(make_recipe, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"instruction": "Bada?"}')
    given = {"path": str(tmp_path / "q.jsonl"), "format": "alpaca", "answers": "generate"}
    _, data = data_of(make_recipe(datasets=[given], max_length=30), lambda *_: [[7] * 50])
    assert len(data.sets[0].examples[0].view.ids) == 30


def test_a_record_without_a_question_is_refused(make_recipe, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Bada."}]}')
    given = {"path": str(tmp_path / "q.jsonl"), "format": "messages", "answers": "generate"}
    with pytest.raises(DataError, match="record 1: no turn of the user, so there is no question"):
        data_of(make_recipe(datasets=[given]), lambda *_: [])
