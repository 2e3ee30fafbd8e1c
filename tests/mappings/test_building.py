"""A table is built from two vocabularies, and built once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import hand_made
from trimtab_mappings import (
    STRATEGIES,
    ByteEncoder,
    Coverage,
    Kind,
    MappingTable,
    build_table,
    cached_table,
    read_vocabulary,
)

PARTS = [*"the cat,\n", " the", " cat", "  ", "    ", "é", "中", "🙂", "<think>", "</s>", "<0x41>"]
ARRAYS = ("mapping", "exact", "segment_offsets", "segment_ids", "target_bytes", "control_bytes")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}<|eot|>{% endfor %}"
BUILD_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
import hand_made
from trimtab_mappings import build_table, cached_table

target, control, directory = hand_made.target(), hand_made.control(), Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
cached_table(target, control, directory)
(path,) = directory.glob("*.safetensors")
for _ in range(300):
    build_table(target, control).save(path)
"""


def with_chat_tokens(read, **roles):
    """The same tokenizer with an end of turn, a padding token and an image."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|eot|>", "<|pad|>", "<|image|>"])
    roles = read.tokenizer.special_tokens_map | {"pad_token": "<|pad|>"} | roles
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def with_other_special_tokens(read):
    """The same tokenizer with new special tokens for all roles, behind all others and in another order."""
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|eos|>", "<|pad|>", "<|unk|>", "<|bos|>"])
    roles = {f"{role}_token": f"<|{role}|>" for role in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def copy_of(read, **roles):
    backend = Tokenizer.from_str(read.tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(read.tokenizer.special_tokens_map | roles))


def chat_control(read, **roles):
    """The same tokenizer with a template that ends turns by `<|stop|>`."""
    tokenizer = copy_of(read)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.add_special_tokens(roles)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|eot|>", "<|stop|>")
    return tokenizer


@cache
def own_table(encoder):
    """The table of a tokenizer to itself."""
    return build_table(encoder, encoder)


def encoder_of(tokenizer):
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer))


@pytest.fixture
def table(gpt2_like, llama_like):
    return build_table(gpt2_like.encoder, llama_like.encoder)


def test_every_token_s_segment_spells_its_bytes(any_family, gpt2_like, llama_like):
    for control in (gpt2_like, llama_like):
        table = build_table(any_family.encoder, control.encoder)
        for token_id in {*range(len(any_family.vocabulary))} - any_family.vocabulary.special:
            assert control.joined(table.segment(token_id)) == any_family.vocabulary.tokens[token_id]


def test_what_a_control_can_not_spell_is_its_unknown_token_in_a_segment(gpt2_like, bert_like):
    table = build_table(gpt2_like.encoder, bert_like.encoder)
    unknown, text = bert_like.vocabulary.roles["unk"], gpt2_like.vocabulary.ids[b"\xe4"]
    assert tuple(table.segment(text)) == unknown


def test_the_segment_of_an_exact_token_is_the_token_that_it_maps_to(table):
    exact = np.flatnonzero(table.exact)
    assert len(exact)
    assert all(table.segment(i).tolist() == [table.mapping[i]] for i in exact)


def test_a_token_that_no_merge_makes_is_still_its_own_segment(merging):
    table = build_table(merging.encoder, merging.encoder)
    token_id = merging.vocabulary.ids[b"abc"]
    assert table.segment(token_id).tolist() == [token_id]
    assert len(merging.encoder.encode(b"abc")[0]) > 1


def test_offsets_partition_the_segments(table):
    lengths = [len(table.segment(i)) for i in range(len(table.mapping))]
    assert table.segment_offsets.tolist() == np.cumsum([0, *lengths]).tolist()
    assert sum(lengths) == len(table.segment_ids)


def test_a_table_has_the_bytes_of_both_vocabularies(table, gpt2_like, llama_like):
    assert table.target_tokens == [*gpt2_like.vocabulary.tokens]
    assert table.control_tokens == [*llama_like.vocabulary.tokens]


def test_a_vocabulary_maps_to_itself_exactly(any_family):
    vocabulary = any_family.vocabulary
    table = build_table(any_family.encoder, any_family.encoder)
    text, special = sum(map(bool, vocabulary.tokens)), len(vocabulary.special)
    rest = len(vocabulary) - text - special  # unused ids
    assert table.coverage == Coverage(exact=text, prefix=0, extension=0, role=special, none=rest)


@given(text=st.lists(st.sampled_from(PARTS)).map("".join) | st.text())
@example(text="  a   b    c     d\n    e")
@example(text="the cat, <think> the cat</s>")
def test_a_tokenizer_mapped_to_itself_is_the_identity_for_all_that_it_can_say(any_family, text):
    mapping = own_table(any_family.encoder).mapping
    for ids in (any_family.natively(text), any_family.encoder.encode(text.encode())[0]):
        assert mapping[ids].tolist() == ids


def test_a_token_that_is_doubled_maps_to_the_one_that_the_tokenizer_says(family):
    doubled = family("with_doubled_tokens")
    of_model, added = doubled.tokenizer.convert_tokens_to_ids(["ĠĠ", "  "])
    assert doubled.natively("x  y")[1] == added
    table = own_table(doubled.encoder)
    assert table.mapping[[of_model, added]].tolist() == [added, added]
    assert table.exact[[of_model, added]].all()
    assert table.segment(of_model).tolist() == [added]


def test_special_tokens_map_by_role_and_never_by_id(gpt2_like, llama_like):
    tokenizer = with_chat_tokens(gpt2_like)
    names = {"bos_token": "<|begin|>", "unk_token": "<|unknown|>", "pad_token": "<|padding|>"}
    tokenizer.add_special_tokens(names)  # that the control does not have
    encoder = encoder_of(tokenizer)
    target = encoder.vocabulary
    control = encoder_of(with_other_special_tokens(llama_like))
    table = build_table(encoder, control)
    theirs = control.vocabulary.roles
    assert target.roles.keys() == theirs.keys() == {"bos", "eos", "unk", "pad"}
    for role, (token_id,) in target.roles.items():
        assert theirs[role] != (token_id,)
        assert (table.mapping[token_id], table.kinds[token_id]) == (theirs[role][0], Kind.ROLE)
        assert tuple(table.segment(token_id)) == theirs[role]
        assert not table.exact[token_id]


def test_a_special_token_without_a_role_maps_to_one_of_its_name_or_to_nothing(gpt2_like, llama_like):
    target = with_chat_tokens(gpt2_like)
    image = target.convert_tokens_to_ids("<|image|>")
    other = copy_of(llama_like)
    other.add_special_tokens({"additional_special_tokens": ["<|video|>", "<|image|>"]})
    named = other.convert_tokens_to_ids("<|image|>")
    for control, expected in ((llama_like.encoder, []), (encoder_of(other), [named])):
        table = build_table(encoder_of(target), control)
        assert table.segment(image).tolist() == expected
        assert table.mapping[image] == [*expected, -1][0]
        assert table.kinds[image] == (Kind.ROLE if expected else Kind.NONE)
        assert not table.exact[image]


@pytest.mark.parametrize("source", ["generation config", "chat template"])
def test_what_ends_a_turn_maps_to_the_control_s_end(gpt2_like, llama_like, source):
    tokenizer = with_chat_tokens(gpt2_like)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot|>")
    if source == "chat template":
        tokenizer.chat_template = CHAT_TEMPLATE
    ends = [2, end_of_turn] if source == "generation config" else ()
    target = ByteEncoder(tokenizer, read_vocabulary(tokenizer, eos_ids=ends))
    control = encoder_of(with_other_special_tokens(llama_like))
    (eos,) = control.vocabulary.roles["eos"]
    assert build_table(target, control).mapping[[2, end_of_turn]].tolist() == [eos, eos]


def test_an_end_of_turn_maps_to_the_control_s_own(gpt2_like, llama_like):
    target = with_chat_tokens(gpt2_like)
    target.chat_template = CHAT_TEMPLATE
    control = chat_control(llama_like)
    vocabulary = read_vocabulary(target)
    table = build_table(encoder_of(target), encoder_of(control))
    (end_of_turn,), (own,) = vocabulary.roles["end_of_turn"], read_vocabulary(control).roles["end_of_turn"]
    assert control.convert_ids_to_tokens(own) == "<|stop|>"
    assert table.mapping[[2, end_of_turn]].tolist() == [2, own]
    assert table.segment(end_of_turn).tolist() == [own]


@pytest.mark.parametrize(
    "template", [None, "{% for message in messages %}{{ message.content }}</s>{% endfor %}"]
)
def test_an_eos_that_ends_turns_maps_to_the_control_s_end_of_turn(gpt2_like, llama_like, template):
    target, control = copy_of(gpt2_like), chat_control(llama_like)
    target.chat_template = template
    own = control.convert_tokens_to_ids("<|stop|>")
    assert build_table(encoder_of(target), encoder_of(control)).mapping[2] == own


def test_an_end_of_turn_maps_to_an_eos_that_ends_the_control_s_turns(gpt2_like, llama_like):
    """As Gemma's beside Qwen, whose eos ends turns, and whose further end is that of a text."""
    target = with_chat_tokens(gpt2_like)
    target.chat_template = CHAT_TEMPLATE
    control = chat_control(llama_like, eos_token="<|stop|>")
    text_end = control.convert_tokens_to_ids("</s>")
    vocabulary = read_vocabulary(control, eos_ids=[text_end])
    assert vocabulary.roles["end_of_turn"] == (text_end,)
    table = build_table(encoder_of(target), ByteEncoder(control, vocabulary))
    own = control.convert_tokens_to_ids("<|stop|>")
    end_of_turn = target.convert_tokens_to_ids("<|eot|>")
    assert table.mapping[[2, end_of_turn]].tolist() == [text_end, own]


def test_of_several_ends_each_maps_to_that_of_its_name(gpt2_like):
    tokenizer = with_chat_tokens(gpt2_like)
    ends = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|image|>"])
    vocabulary = read_vocabulary(tokenizer, eos_ids=ends)
    encoder = ByteEncoder(tokenizer, vocabulary)
    table = build_table(encoder, encoder)
    assert table.mapping[[2, *ends]].tolist() == [2, *ends]


@pytest.mark.parametrize("role", ["pad", "unk"])
def test_a_role_that_the_control_s_eos_plays_too_is_no_counterpart(gpt2_like, llama_like, role):
    target = copy_of(gpt2_like)
    target.add_special_tokens({f"{role}_token": f"<|{role}|>"})
    control = copy_of(llama_like, **{f"{role}_token": "</s>"})
    mapped = build_table(encoder_of(target), encoder_of(control)).mapping
    assert mapped[target.convert_tokens_to_ids(f"<|{role}|>")] in {-1, 0}
    assert mapped[2] == 2


def test_a_token_of_several_roles_is_taken_for_the_end(gpt2_like, llama_like):
    roles = {"bos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    table = build_table(encoder_of(with_chat_tokens(gpt2_like, **roles)), llama_like.encoder)
    assert table.mapping[2] == 2


def test_a_control_without_such_roles_or_names_leaves_special_tokens_unmapped(gpt2_like):
    backend = Tokenizer.from_str(gpt2_like.tokenizer.backend_tokenizer.to_str().replace('s>"', 'z>"'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    table = build_table(gpt2_like.encoder, encoder_of(tokenizer))
    assert table.mapping[1:3].tolist() == [-1, -1]
    assert (table.kinds[1:3] == Kind.NONE).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cached_table_is_built_once(gpt2_like, llama_like, tmp_path, strategy):
    target, control = gpt2_like.vocabulary, llama_like.vocabulary
    built = cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path, strategy)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{target.fingerprint[:16]}-{control.fingerprint[:16]}-{strategy}.safetensors"
    written = path.stat().st_mtime_ns
    again = cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path, strategy)
    assert path.stat().st_mtime_ns == written
    assert (built.source, again.source) == (None, path)
    np.testing.assert_array_equal(again.mapping, built.mapping)


def test_a_cached_table_is_of_its_own_strategy(gpt2_like, llama_like, tmp_path):
    for _ in ("built", "loaded"):
        tables = [cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path, name) for name in STRATEGIES]
        assert [table.strategy for table in tables] == [*STRATEGIES]


def test_a_cached_table_that_is_refused_is_built_anew_and_the_log_says_why(
    gpt2_like, llama_like, tmp_path, caplog
):
    cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"rubbish")
    with caplog.at_level(logging.WARNING):
        cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path)
    assert str(path) in caplog.text
    MappingTable.load(path).check(gpt2_like.vocabulary, llama_like.vocabulary)


@pytest.mark.parametrize("other", ["target", "control"])
def test_a_cached_table_for_another_vocabulary_is_built_anew(
    gpt2_like, llama_like, bert_like, tmp_path, other
):
    sides = {"target": gpt2_like, "control": llama_like}
    cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    sides[other] = bert_like
    build_table(sides["target"].encoder, sides["control"].encoder).save(path)
    table = cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path)
    table.check(gpt2_like.vocabulary, llama_like.vocabulary)
    MappingTable.load(path).check(gpt2_like.vocabulary, llama_like.vocabulary)


def test_processes_that_build_one_table_at_once_never_leave_half_of_it(tmp_path):
    target, control = hand_made.target(), hand_made.control()
    command = [sys.executable, "-c", BUILD_AGAIN_AND_AGAIN, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    builders = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    with builders[0], builders[1]:
        assert [builder.stdout.readline() for builder in builders] == ["ready\n"] * 2
        for builder in builders:
            print(file=builder.stdin, flush=True)
        expected, written = build_table(target, control), set()
        while any(builder.poll() is None for builder in builders):
            for path in tmp_path.glob("*.safetensors"):
                loaded = MappingTable.load(path)
                written.add(path.stat().st_mtime_ns)
                assert all(np.array_equal(getattr(loaded, name), getattr(expected, name)) for name in ARRAYS)
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(written) > 1  # it was read while it was being replaced
    assert len([*tmp_path.iterdir()]) == 1


def test_a_table_that_can_not_be_kept_is_used_all_the_same(gpt2_like, llama_like, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        table = cached_table(gpt2_like.encoder, llama_like.encoder, tmp_path / "file")
    table.check(gpt2_like.vocabulary, llama_like.vocabulary)
    assert "the mapping table can't be kept" in caplog.text


def test_a_table_of_a_side_without_any_role_is_built_with_a_warning(gpt2_like, llama_like, tmp_path, caplog):
    backend = Tokenizer.from_str(gpt2_like.tokenizer.backend_tokenizer.to_str())
    control = encoder_of(PreTrainedTokenizerFast(tokenizer_object=backend))
    with caplog.at_level(logging.WARNING):
        cached_table(llama_like.encoder, control, tmp_path)
    assert f"the control {control.vocabulary.name!r} has no special token with a role" in caplog.text
    assert "the target" not in caplog.text
