"""Directories that are made once, and whole."""

from __future__ import annotations

import pytest

from trimtab_training.world.cache import content_key, made_whole


def test_a_key_changes_with_facts_and_sources_and_with_nothing_else(tmp_path):
    source = tmp_path / "source.py"
    source.write_text("x = 1")
    key = content_key({"seed": 1, "people": 80}, ["torch"], [source])
    assert content_key({"people": 80, "seed": 1}, ["torch"], [source]) == key
    assert content_key({"people": 80, "seed": 2}, ["torch"], [source]) != key
    assert content_key({"people": 80, "seed": 1}, ["torch", "tokenizers"], [source]) != key
    source.write_text("x = 2")
    assert content_key({"people": 80, "seed": 1}, ["torch"], [source]) != key


def test_a_directory_appears_when_it_is_whole(tmp_path):
    with made_whole(tmp_path / "new") as made:
        (made / "file").write_text("whole")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_or_an_interrupt_leaves_what_was_there(tmp_path, error):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    with pytest.raises(error), made_whole(tmp_path / "old") as made:  # noqa: PT012 - the block is what fails
        (made / "file").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_what_was_there_is_replaced_altogether(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "stale").touch()
    with made_whole(tmp_path / "old") as made:
        (made / "fresh").touch()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["fresh"]
