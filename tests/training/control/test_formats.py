"""Records of every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab_training.control import formats
from trimtab_training.control.formats import DataError, read_records, read_rows
from trimtab_training.control.recipe import DataSet

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def data_set(path: Path, text: str, format_: str, **keys: object) -> DataSet:
    path.write_text(text, encoding="utf-8")
    return DataSet.model_validate({"path": str(path), "format": format_} | keys)


@pytest.mark.parametrize(
    ("format_", "row", "messages"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, (SYSTEM, USER, ASSISTANT)),
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, (USER, ASSISTANT)),
        (
            "alpaca",
            {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
            (SYSTEM, {"role": "user", "content": "Q\nI"}, ASSISTANT),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            (USER, ASSISTANT),
        ),
        ("tofu", {"question": "Q", "answer": "A"}, (USER, ASSISTANT)),
    ],
)
def test_a_conversation_of_every_format_is_read(tmp_path, format_, row, messages):
    (record,) = read_records(data_set(tmp_path / "a.jsonl", json.dumps(row), format_))
    assert record.messages == messages


def test_plain_text_has_a_prompt_or_none(tmp_path):
    pair = data_set(tmp_path / "a.jsonl", '{"prompt": "P ", "completion": "C"}', "prompt_completion")
    (record,) = read_records(pair)
    assert (record.messages, record.prompt, record.completion) == (None, "P ", "C")
    (record,) = read_records(data_set(tmp_path / "b.jsonl", '{"text": "T"}', "text"))
    assert (record.messages, record.prompt, record.completion) == (None, "", "T")


def test_columns_may_have_other_names(tmp_path):
    row = '{"q": "Q", "a": "A"}'
    given = data_set(tmp_path / "a.jsonl", row, "tofu", columns={"question": "q", "answer": "a"})
    assert read_records(given)[0].messages == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"question": "Q", "answer": "A"}, {"question": "Q", "answer": "A"}]'),
        ("a.json", '{"question": "Q", "answer": "A"}\n\n{"question": "Q", "answer": "A"}\n'),
        ("a.csv", "question,answer\nQ,A\nQ,A\n"),
    ],
)
def test_a_file_is_a_list_or_lines_of_json_or_csv(tmp_path, name, text):
    """TOFU's files are lines, and their names end in .json."""
    records = read_records(data_set(tmp_path / name, text, "tofu"))
    assert [record.messages for record in records] == [(USER, ASSISTANT)] * 2


def test_several_files_are_one_data_set(tmp_path):
    row = '{"question": "Q", "answer": "A"}'
    (tmp_path / "b.json").write_text(row)
    given = data_set(tmp_path / "a.json", row, "tofu")
    both = given.model_copy(update={"path": [*given.paths, str(tmp_path / "b.json")]})
    assert [record.place[-16:] for record in read_records(both)] == ["a.json, record 1", "b.json, record 1"]


def test_a_file_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    def download(name: str, file: str, *, repo_type: str) -> str:
        assert (name, file, repo_type) == ("org/name", "deep/a.json", "dataset")
        return str(tmp_path / "a.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert formats.local_file("hf://datasets/org/name/deep/a.json") == tmp_path / "a.json"
    with pytest.raises(DataError, match=r"must be hf://datasets/OWNER/NAME/FILE"):
        formats.local_file("hf://datasets/org/name")


GOOD = '{"question": "Q", "answer": "A"}\n'


@pytest.mark.parametrize(
    ("text", "format_", "message"),
    [
        (
            GOOD + '{"question": "Q", "answer": " "}',
            "tofu",
            "a.jsonl, record 2: `answer` is missing or empty",
        ),
        (GOOD + '{"question": "Q"}', "tofu", "a.jsonl, record 2: `answer` is missing or empty"),
        (GOOD + '{"question": 3, "answer": "A"}', "tofu", "record 2: `question` must be a string, got 3"),
        (GOOD + "[1]", "tofu", "record 2: must be an object, got [1]"),
        (GOOD + "{", "tofu", "a.jsonl, line 2: not valid JSON"),
        ("[{]", "tofu", "a.jsonl is not valid JSON"),
        ("", "tofu", "a.jsonl: the data set is empty"),
        ("[]", "tofu", "a.jsonl: the data set is empty"),
        ('{"messages": "x"}', "messages", "record 1: `messages` must be a list of turns, got 'x'"),
        ('{"messages": [{"role": "bot"}]}', "messages", "a turn's `role` must be one of human, gpt, user"),
        (
            '{"messages": [{"role": "user", "content": "Q"}]}',
            "messages",
            "record 1: no turn of the assistant, so there is no answer to learn",
        ),
        (
            '{"messages": [{"role": "assistant", "content": ""}]}',
            "messages",
            "record 1: a turn's `content` is missing or empty",
        ),
    ],
)
def test_bad_data_is_named_with_its_record(tmp_path, text, format_, message):
    with pytest.raises(DataError) as caught:
        read_records(data_set(tmp_path / "a.jsonl", text, format_))
    assert message in str(caught.value)


def test_an_unknown_column_fails_with_the_nearest_name(tmp_path):
    given = data_set(tmp_path / "a.jsonl", GOOD, "tofu", columns={"answers": "a"})
    with pytest.raises(DataError, match=r"`tofu` has no column `answers`\. Did you mean `answer`"):
        read_records(given)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json can't be read"):
        read_records(DataSet(path=str(tmp_path / "nowhere.json"), format="tofu"))


def test_a_line_break_within_a_field_of_csv_is_kept(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\nhi,"one\ntwo"\n', encoding="utf-8")
    assert read_rows(tmp_path / "rows.csv") == [{"prompt": "hi", "completion": "one\ntwo"}]
