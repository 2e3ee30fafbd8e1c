"""Texts come from plain files, and from the `text` of JSON lines."""

from __future__ import annotations

import pytest

from trimtab_mappings.texts import TextError, read_texts


def test_a_plain_file_is_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert read_texts([path]) == ["one\ntwo\n"]


def test_of_json_lines_each_text_is_one_and_empty_lines_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028two"}\n\n{"idx": 1, "text": "three"}\n', encoding="utf-8")
    assert read_texts([path]) == ["one\u2028two", "three"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d"}\n', encoding="utf-8")
    assert read_texts([path]) == ["a?"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected JSON"),
        ("[" * 200_000, "expected JSON"),
        *((line, "expected an object with a string 'text'") for line in ("[1]", '"text"', '{"idx": 1}', "3")),
        ('{"text": 3}', "expected an object with a string 'text'"),
    ],
)
def test_a_line_without_a_text_is_named(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(TextError, match=rf"{path}, line 2: {expected}"):
        read_texts([path])


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(TextError, match=f"{path} can't be read: No such file"):
        read_texts([path])
    path.write_bytes(b"\xff")
    with pytest.raises(TextError, match=f"{path}: expected a text in UTF-8"):
        read_texts([path])
