"""A mapping table: what is in it, and what is refused."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, MappingTable, TableError, build_table, cached_table, read_vocabulary

ARRAYS = ("mapping", "exact", "segment_offsets", "segment_ids")


def with_chat_tokens(read, **roles):
    """The same tokenizer with an end of turn, a padding token and an image."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|eot|>", "<|pad|>", "<|image|>"])
    roles = read.tokenizer.special_tokens_map | {"pad_token": "<|pad|>"} | roles
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture
def table(gpt2_like, llama_like):
    return build_table(gpt2_like.vocabulary, llama_like.encoder)


@pytest.fixture
def saved(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    return path


def test_every_token_s_segment_spells_its_bytes(complete, gpt2_like, llama_like):
    for control in (gpt2_like, llama_like):
        table = build_table(complete.vocabulary, control.encoder)
        for token_id in {*range(len(complete.vocabulary))} - complete.vocabulary.special:
            assert control.joined(table.segment(token_id)) == complete.vocabulary.tokens[token_id]


def test_the_segment_of_an_exact_token_is_the_token_that_it_maps_to(table):
    exact = np.flatnonzero(table.exact)
    assert len(exact)
    assert all(table.segment(i).tolist() == [table.mapping[i]] for i in exact)


def test_a_token_that_no_merge_makes_is_still_its_own_segment(merging):
    table = build_table(merging.vocabulary, merging.encoder)
    token_id = merging.vocabulary.ids[b"abc"]
    assert table.segment(token_id).tolist() == [token_id]
    assert len(merging.encoder.encode(b"abc")[0]) > 1


def test_offsets_partition_the_segments(table):
    lengths = [len(table.segment(i)) for i in range(len(table.mapping))]
    assert table.segment_offsets.tolist() == np.cumsum([0, *lengths]).tolist()
    assert sum(lengths) == len(table.segment_ids)


def test_special_tokens_map_by_role_and_never_by_id(gpt2_like, llama_like):
    tokenizer = with_chat_tokens(gpt2_like)
    end_of_turn, pad, image = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|pad|>", "<|image|>"])
    target = read_vocabulary(tokenizer, eos_ids=[2, end_of_turn])
    table = build_table(target, llama_like.encoder)
    specials = {0: [0], 1: [1], 2: [2], end_of_turn: [2], pad: [], image: []}
    assert {i: table.segment(i).tolist() for i in target.special} == specials
    assert {i: table.mapping[i] for i in target.special} == {i: [*ids, -1][0] for i, ids in specials.items()}
    assert not table.exact[list(target.special)].any()


def test_a_token_of_several_roles_is_taken_for_the_end(gpt2_like, llama_like):
    roles = {"bos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    table = build_table(read_vocabulary(with_chat_tokens(gpt2_like, **roles)), llama_like.encoder)
    assert table.mapping[2] == 2


def test_a_padding_token_maps_to_the_control_s(gpt2_like, llama_like):
    tokenizer = with_chat_tokens(llama_like)
    control = ByteEncoder(tokenizer, read_vocabulary(tokenizer))
    target = read_vocabulary(with_chat_tokens(gpt2_like))
    table = build_table(target, control)
    assert table.mapping[target.roles["pad"][0]] == tokenizer.pad_token_id


def test_a_control_without_such_roles_leaves_special_tokens_unmapped(gpt2_like):
    backend = Tokenizer.from_str(gpt2_like.tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    table = build_table(gpt2_like.vocabulary, ByteEncoder(tokenizer, read_vocabulary(tokenizer)))
    assert table.mapping[:3].tolist() == [-1, -1, -1]


def test_coverage_counts_every_row_once(table):
    assert sum(table.coverage) == len(table.mapping)
    assert table.coverage.exact == table.exact.sum()
    assert table.coverage.none == (table.mapping == -1).sum()


def test_a_table_comes_back_from_its_file_as_it_was(table, saved, gpt2_like, llama_like):
    loaded = MappingTable.load(saved)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name), strict=True)
    assert (loaded.target_name, loaded.control_name) == ("gpt2-like", "llama-like")
    loaded.check(gpt2_like.vocabulary, llama_like.vocabulary)


def test_saving_makes_the_directory_and_leaves_nothing_else(table, tmp_path):
    path = tmp_path / "a" / "b" / "table.safetensors"
    table.save(path)
    table.save(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(table, saved, monkeypatch):
    before = saved.read_bytes()
    larger = dataclasses.replace(table, target_name="another")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(type(saved), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        larger.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.safetensors"
    with pytest.raises(
        TableError, match=f"mapping table {path}: can't be read: .*trimtab map build .*{path}"
    ):
        MappingTable.load(path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(TableError, match=f"mapping table {saved}: can't be read: .*trimtab map build"):
        MappingTable.load(saved)


def test_a_file_of_another_kind_is_refused(saved):
    save_file({"weight": np.zeros(3)}, saved)
    with pytest.raises(TableError, match="is not a mapping table: its metadata is of another kind"):
        MappingTable.load(saved)


def test_a_file_of_another_version_is_refused(table, saved, monkeypatch):
    monkeypatch.setattr("trimtab_mappings.table.VERSION", "2")
    with pytest.raises(
        TableError,
        match=r"has version '1', this program reads version '2'.*--target gpt2-like --control llama-like",
    ):
        MappingTable.load(saved)


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("mapping", np.zeros(3, np.int64), r"mapping is int64 \(3,\), expected one row of int32"),
        ("exact", np.zeros((2, 2), np.bool_), r"exact is bool \(2, 2\), expected one row of bool"),
        ("exact", np.zeros(3, np.bool_), "mapping has 403 rows, exact 3, segment_offsets 404"),
        ("segment_offsets", np.zeros(404, np.int32), "do not partition"),
        ("segment_ids", np.zeros(3, np.int32), "do not partition"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(table, tmp_path, name, array, fault):
    path = tmp_path / "table.safetensors"
    rows = len(table.mapping)
    fault = fault.replace("403", str(rows)).replace("404", str(rows + 1))
    array = np.zeros(rows + 1, array.dtype) if array.size == 404 else array
    dataclasses.replace(table, **{name: array}).save(path)
    with pytest.raises(TableError, match=f"{path}: .*{fault}"):
        MappingTable.load(path)


def test_segments_that_start_behind_the_first_id_are_refused(table, tmp_path):
    offsets = table.segment_offsets.copy()
    offsets[0] = offsets[1]
    assert offsets[0] > 0
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, segment_offsets=offsets).save(path)
    with pytest.raises(TableError, match="do not partition"):
        MappingTable.load(path)


def test_a_table_without_an_array_is_refused(saved):
    from safetensors import safe_open

    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(saved)
    del arrays["exact"]
    save_file(arrays, saved, metadata)
    with pytest.raises(TableError, match=r"can't be read: .*exact"):
        MappingTable.load(saved)


def test_a_table_for_another_tokenizer_is_refused_and_both_sides_are_named(saved, gpt2_like, llama_like):
    loaded = MappingTable.load(saved)
    ours, theirs = gpt2_like.vocabulary, llama_like.vocabulary
    with pytest.raises(TableError) as refusal:
        loaded.check(theirs, theirs)
    message = str(refusal.value)
    assert f"mapping table {saved}: its target is 'gpt2-like' ({ours.fingerprint[:16]})" in message
    assert f"but the target here is 'llama-like' ({theirs.fingerprint[:16]})" in message
    assert f"trimtab map build --target llama-like --control llama-like --output {saved}" in message
    with pytest.raises(
        TableError, match=r"its control is 'llama-like' .* but the control here is 'gpt2-like'"
    ):
        loaded.check(ours, ours)


def test_a_cached_table_is_built_once(gpt2_like, llama_like, tmp_path, monkeypatch):
    built = cached_table(gpt2_like.vocabulary, llama_like.encoder, tmp_path)
    name = f"{gpt2_like.vocabulary.fingerprint[:16]}-{llama_like.vocabulary.fingerprint[:16]}.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    monkeypatch.setattr("trimtab_mappings.table.build_table", None)
    again = cached_table(gpt2_like.vocabulary, llama_like.encoder, tmp_path)
    np.testing.assert_array_equal(again.mapping, built.mapping)


def test_a_cached_table_that_is_refused_is_built_anew_and_the_log_says_why(
    gpt2_like, llama_like, tmp_path, caplog
):
    cached_table(gpt2_like.vocabulary, llama_like.encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"rubbish")
    with caplog.at_level(logging.WARNING):
        cached_table(gpt2_like.vocabulary, llama_like.encoder, tmp_path)
    assert str(path) in caplog.text
    MappingTable.load(path).check(gpt2_like.vocabulary, llama_like.vocabulary)
