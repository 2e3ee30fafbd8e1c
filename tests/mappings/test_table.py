"""A mapping table: what is in it, and what is refused."""

from __future__ import annotations

import dataclasses
import shlex

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import hand_made
from trimtab_mappings import Coverage, Kind, MappingTable, TableError, build_table
from trimtab_mappings.table_file import check_replaceable

ARRAYS = (
    *("mapping", "exact", "segment_offsets", "segment_ids"),
    *("target_offsets", "target_bytes", "control_offsets", "control_bytes"),
)
TEXTS = ("strategy", "target_name", "control_name", "target_fingerprint", "control_fingerprint")
NO_TABLE = "name a file that `trimtab map build` wrote"
BUILD = "make it anew: trimtab map build --target {} --control {}{} --output {}"


def differences(one, other):
    """In which fields two tables differ."""
    arrays = [name for name in ARRAYS if not np.array_equal(getattr(one, name), getattr(other, name))]
    return arrays + [name for name in TEXTS if getattr(one, name) != getattr(other, name)]


def refusal(path):
    """The message with which a file is refused: what is wrong, and what makes it anew."""
    with pytest.raises(TableError) as error:
        MappingTable.load(path)
    message = str(error.value)
    assert message.startswith(f"mapping table {path}: ")
    fault, _, command = message.removeprefix(f"mapping table {path}: ").rpartition("; ")
    return fault, command


def load_or_refusal(path):
    try:
        return MappingTable.load(path)
    except TableError as error:
        return str(error)


def arrays_start(content):
    """Where the arrays begin in the bytes of a safetensors file."""
    return 8 + int.from_bytes(content[:8], "little")


def metadata_of(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def kind_by_definition(table, token_id):
    """Compare the bytes; slow."""
    token, control_id = table.target_tokens[token_id], table.mapping[token_id]
    if control_id < 0:
        return Kind.NONE
    if not token:
        return Kind.ROLE
    other = table.control_tokens[control_id]
    if other == token:
        return Kind.EXACT
    assert token.startswith(other) != other.startswith(token)
    return Kind.PREFIX if token.startswith(other) else Kind.EXTENSION


@pytest.fixture(scope="module")
def table():
    return build_table(hand_made.target(), hand_made.control())


@pytest.fixture
def saved(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    return path


@pytest.fixture(scope="module")
def content(table, tmp_path_factory):
    """The bytes of a table's file."""
    path = tmp_path_factory.mktemp("saved") / "table.safetensors"
    table.save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "table.safetensors"


def test_the_kind_of_a_row_is_how_the_two_tokens_compare(any_family, gpt2_like, llama_like):
    for control in (gpt2_like, llama_like):
        table = build_table(any_family.encoder, control.encoder)
        expected = [kind_by_definition(table, token_id) for token_id in range(len(table.mapping))]
        assert table.kinds.tolist() == expected


def test_coverage_counts_the_rows_of_each_kind(gpt2_like, llama_like):
    table = build_table(gpt2_like.encoder, llama_like.encoder)
    kinds = table.kinds.tolist()
    assert table.coverage == Coverage(**{kind.name.lower(): kinds.count(kind) for kind in Kind})
    assert sum(table.coverage) == len(gpt2_like.vocabulary)
    assert min(table.coverage[:-1]) > 0


def test_coverage_can_be_weighed_by_how_often_tokens_are_used(table):
    uses = np.arange(len(table.mapping))
    coverage = table.weighted_coverage(uses)
    assert coverage.exact == uses[table.exact].sum()
    assert sum(coverage) == uses.sum()


def test_a_table_comes_back_from_its_file_as_it_was(table, saved):
    loaded = MappingTable.load(saved)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name), strict=True)
    assert not differences(loaded, table)
    assert (loaded.target_name, loaded.control_name) == ("the-target", "the-control")
    assert (loaded.source, table.source) == (saved, None)


def test_saving_makes_the_directory_and_leaves_nothing_else(table, tmp_path):
    path = tmp_path / "a" / "b" / "table.safetensors"
    table.save(path)
    table.save(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_what_was_there(table, tmp_path):
    path = tmp_path / "table.safetensors"
    (path / "not empty").mkdir(parents=True)  # which no file replaces
    with pytest.raises(OSError, match=rf": '{path}'$"):  # and not the temporary file's name
        table.save(path)
    assert [*tmp_path.iterdir()] == [path]
    assert [*path.iterdir()] == [path / "not empty"]


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.safetensors"
    fault, command = refusal(path)
    assert "there is no such file" in fault
    assert command == BUILD.format("TARGET", "CONTROL", "", path)


def test_what_is_no_table_is_refused_without_advice_to_build_over_it(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "notes.txt").write_text("a table has the format trimtab-mapping", encoding="utf-8")
    for path in (tmp_path, *tmp_path.iterdir()):
        assert refusal(path)[1] == NO_TABLE


@given(data=st.data())
@example(data=None)
def test_a_file_truncated_anywhere_is_refused(content, scratch, data):
    length = data.draw(st.integers(0, len(content) - 1)) if data else len(content) - 1
    scratch.write_bytes(content[:length])
    fault, command = refusal(scratch)
    assert "can't be read as a safetensors file with a table's arrays" in fault
    known = b'"format":"trimtab-mapping"' in content[:length]
    assert command == (BUILD.format("TARGET", "CONTROL", "", scratch) if known else NO_TABLE)


@settings(max_examples=2000)
@given(data=st.data())
def test_a_file_with_a_changed_byte_is_refused_or_is_the_same_table(table, content, scratch, data):
    position = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255))
    assume(content[position] != byte)
    scratch.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
    loaded = load_or_refusal(scratch)
    if isinstance(loaded, MappingTable):
        assert not differences(loaded, table)
    else:
        assert loaded.startswith(f"mapping table {scratch}: ")
        assert "; make it anew: trimtab map build --target " in loaded or loaded.endswith(NO_TABLE)
        assert "checksum error" in loaded or position < arrays_start(content)


@given(extra=st.binary(min_size=1))
def test_a_file_with_bytes_behind_its_end_is_refused(content, scratch, extra):
    scratch.write_bytes(content + extra)
    assert "can't be read as a safetensors file" in refusal(scratch)[0]


@given(junk=st.binary())
def test_a_file_of_any_other_bytes_is_refused(scratch, junk):
    scratch.write_bytes(junk)
    fault, advice = refusal(scratch)
    assert "can't be read as a safetensors file" in fault
    assert advice == NO_TABLE


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "trimtab-mapping"}])
def test_a_file_of_another_kind_is_refused(saved, metadata):
    save_file({"weight": np.zeros(3)}, saved, metadata)
    fault, command = refusal(saved)
    found = [*metadata] if metadata else []
    assert fault == f"is not a mapping table: expected metadata with format 'trimtab-mapping', found {found}"
    assert command == NO_TABLE


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        ("1", ""),
        ("2", ""),
        ("3", ""),
        ("4", ""),
        ("6", " (upgrade trimtab to read it)"),
        ("12", " (upgrade trimtab to read it)"),
        ("new", ""),
    ],
)
def test_a_file_of_another_version_is_refused(saved, version, advice):
    save_file(load_file(saved), saved, metadata_of(saved) | {"version": version})
    fault, command = refusal(saved)
    assert fault == f"has format version '{version}', expected '5'{advice}"
    assert command == BUILD.format("the-target", "the-control", " --strategy pm-mined", saved)


def test_a_file_of_the_first_version_is_refused(table, saved):
    texts = {key: getattr(table, key) for key in TEXTS if key != "strategy"}
    arrays = {key: getattr(table, key) for key in ARRAYS[:4]}
    save_file(arrays, saved, {"format": "trimtab-mapping", "version": "1", **texts})
    fault, command = refusal(saved)
    assert fault == "has format version '1', expected '5'"
    assert command == BUILD.format("the-target", "the-control", "", saved)


@pytest.mark.parametrize("key", [*TEXTS, "sha256"])
def test_a_table_without_a_part_of_its_metadata_is_refused(saved, key):
    save_file(load_file(saved), saved, {k: v for k, v in metadata_of(saved).items() if k != key})
    assert refusal(saved)[0] == f"is corrupted: its metadata lacks {key}"


@pytest.mark.parametrize("key", TEXTS)
def test_a_table_whose_metadata_was_changed_is_refused(saved, key):
    save_file(load_file(saved), saved, metadata_of(saved) | {key: "another"})
    assert "is corrupted, checksum error: its contents have sha256" in refusal(saved)[0]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_table_without_an_array_is_refused(saved, name):
    arrays = load_file(saved)
    del arrays[name]
    save_file(arrays, saved, metadata_of(saved))
    assert name in refusal(saved)[0]


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("mapping", np.zeros(15, np.int64), "mapping is int64 (15,), expected one row of int32"),
        ("exact", np.zeros((2, 2), np.bool_), "exact is bool (2, 2), expected one row of bool"),
        ("exact", np.zeros(3, np.bool_), "exact has 3 entries, expected 15 for 15 rows of mapping"),
        ("segment_offsets", np.zeros(15, np.int32), "segment_offsets has 15 entries, expected 16 for 15"),
        ("target_offsets", np.zeros(17, np.int32), "target_offsets has 17 entries, expected 16 for 15"),
        ("segment_offsets", np.zeros(16, np.int32), "segment_offsets do not partition segment_ids"),
        ("segment_ids", np.zeros(3, np.int32), "segment_offsets do not partition segment_ids"),
        ("target_bytes", np.zeros(3, np.uint8), "target_offsets do not partition target_bytes"),
        ("control_offsets", np.zeros(0, np.int32), "control_offsets do not partition control_bytes"),
        ("control_offsets", np.arange(9)[::-1].astype(np.int32), "control_offsets do not partition"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(table, tmp_path, name, array, fault):
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, **{name: array}).save(path)
    found, command = refusal(path)
    assert fault in found
    assert command == BUILD.format("the-target", "the-control", " --strategy pm-mined", path)


def test_segments_that_start_behind_the_first_id_are_refused(table, tmp_path):
    offsets = table.segment_offsets.copy()
    offsets[0] = offsets[1]
    assert offsets[0] > 0
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, segment_offsets=offsets).save(path)
    assert refusal(path)[0] == "segment_offsets do not partition segment_ids"


def test_offsets_that_fall_so_far_that_their_difference_wraps_around_are_refused(table, tmp_path):
    offsets = table.target_offsets.copy()
    offsets[1:-1] = -2
    offsets[1] = np.iinfo(np.int32).max
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, target_offsets=offsets).save(path)
    assert refusal(path)[0] == "target_offsets do not partition target_bytes"


@pytest.mark.parametrize(
    ("name", "value", "lowest"),
    [("mapping", 13, -1), ("mapping", -2, -1), ("segment_ids", 13, 0), ("segment_ids", -1, 0)],
)
def test_ids_that_the_control_does_not_have_are_refused(table, tmp_path, name, value, lowest):
    ids = getattr(table, name).copy()
    ids[0] = value
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, **{name: ids}).save(path)
    found = f"{name} has ids from {ids.min()} to {ids.max()}, expected {lowest} to 12"
    assert refusal(path)[0] == found


def test_a_table_for_another_tokenizer_is_refused_and_both_sides_are_named(saved, gpt2_like, llama_like):
    loaded = MappingTable.load(saved)
    target, control = hand_made.target().vocabulary, hand_made.control().vocabulary
    loaded.check(target, control)
    loaded.check(target)
    ours, theirs = gpt2_like.vocabulary, llama_like.vocabulary
    faults = [
        f"its {side} is {own.name!r} ({own.fingerprint[:16]}), but the {side} here is"
        f" {here.name!r} ({here.fingerprint[:16]})"
        for side, own, here in (("target", target, ours), ("control", control, theirs))
    ]
    for here, names, expected in (
        ((ours, control), ("gpt2-like", "the-control"), faults[0]),
        ((ours,), ("gpt2-like", "the-control"), faults[0]),
        ((target, theirs), ("the-target", "llama-like"), faults[1]),
        ((ours, theirs), ("gpt2-like", "llama-like"), "; ".join(faults)),
    ):
        with pytest.raises(TableError) as error:
            loaded.check(*here)
        command = BUILD.format(*names, " --strategy pm-mined", saved)
        assert str(error.value) == f"mapping table {saved}: {expected}; {command}"


def test_a_changed_array_is_a_checksum_error_before_anything_else_is_said_of_it(saved):
    content = bytearray(saved.read_bytes())
    start = arrays_start(content)
    for position in range(start, len(content), 7):
        changed = content.copy()
        changed[position] ^= 0x80
        saved.write_bytes(changed)
        assert "is corrupted, checksum error: " in refusal(saved)[0]


def test_swapped_sides_are_said_to_be_swapped_and_nothing_is_to_be_built(saved):
    target, control = hand_made.target().vocabulary, hand_made.control().vocabulary
    with pytest.raises(TableError) as error:
        MappingTable.load(saved).check(control, target)
    message = str(error.value)
    assert message.startswith(f"mapping table {saved}: the target and the control are swapped: its target is")
    assert message.endswith("; name them the other way round")


@pytest.mark.parametrize("before", ["no file", "an empty file", "a table", "a damaged table"])
def test_a_table_may_be_written_where_nothing_or_a_table_is(table, tmp_path, before):
    path = tmp_path / "table.safetensors"
    if before == "an empty file":
        path.touch()
    elif before != "no file":
        table.save(path)
        path.write_bytes(path.read_bytes()[: -1 if before == "a damaged table" else None])
    check_replaceable(path)


def test_a_table_may_not_be_written_over_anything_else(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    for path in tmp_path.iterdir():
        with pytest.raises(TableError, match=f"^{path} is a file that is no mapping table, and is not"):
            check_replaceable(path)
    with pytest.raises(TableError, match=f"^{tmp_path} is no file, and is not replaced; name another file$"):
        check_replaceable(tmp_path)


def test_a_table_that_was_never_saved_is_refused_without_naming_a_file(table, gpt2_like):
    with pytest.raises(TableError, match=r"^mapping table: its target is .* --output FILE$"):
        table.check(gpt2_like.vocabulary)


@pytest.mark.parametrize("names", ["[]", "{", '{"x": "<s>"}', '{"9999999": "<s>"}', '{"0": 1}', "3"])
def test_names_of_special_tokens_that_are_none_are_refused(table, tmp_path, monkeypatch, names):
    path = tmp_path / "table.safetensors"
    with monkeypatch.context() as patch:  # such a file has a right checksum: that is no signature
        patch.setattr("trimtab_mappings.table.encoded_names", lambda _: names)
        table.save(path)
    fault, _ = refusal(path)
    assert "target_special is no JSON object of token ids and names" in fault


def test_the_command_to_run_is_quoted(table, tmp_path):
    path = tmp_path / "a table.safetensors"
    dataclasses.replace(table, target_name="t; touch x").save(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # a token's last byte: the checksum finds it
    with pytest.raises(TableError) as error:
        MappingTable.load(path)
    words = shlex.split(str(error.value).partition("make it anew: ")[2])
    assert words[words.index("--target") + 1] == "t; touch x"
    assert words[-1] == str(path)
