"""What a replica prints."""

from __future__ import annotations

import pytest
from vllm.v1.sample.logits_processor import STR_POOLING_REJECTS_LOGITSPROCS, STR_SPEC_DEC_REJECTS_LOGITSPROCS

from trimtab_server.engines.process import TAIL_LINES, Output


@pytest.fixture
def output(tmp_path):
    output = Output("m", tmp_path / "m.log", echo=False)
    yield output
    output.close()


def test_lines_are_put_together_from_pieces(output):
    for piece in (b"fir", b"st\nsec", b"ond\r", b"third\n\nfour"):
        output.feed(piece)
    assert output.path.read_text() == "first\nsecond\nthird\n"
    assert output.last_line == "third"


def test_the_tail_has_the_last_lines_and_says_where_the_rest_is(output):
    output.feed("".join(f"line {i}\n" for i in range(100)).encode())
    tail = output.tail()
    assert str(output.path) in tail
    assert tail.count("\n") == TAIL_LINES
    assert tail.endswith("line 99")
    assert f"line {99 - TAIL_LINES}\n" not in tail


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        (STR_POOLING_REJECTS_LOGITSPROCS, "this is a pooling model"),
        (STR_SPEC_DEC_REJECTS_LOGITSPROCS, "no speculative decoding beside a control"),
    ],
)
def test_an_error_of_vllms_that_a_control_brings_is_said_in_words_of_ours(output, line, meaning):
    """However far above the last lines it stands; the words are those of the vLLM that is installed."""
    output.feed(f"ValueError: {line}\n".encode() + b"more\n" * 100)
    assert meaning in output.tail()
    output.begin(["vllm"])
    assert meaning not in output.tail()


def test_a_new_run_begins_with_its_command_and_an_empty_tail(output):
    output.feed(b"old\nhalf a li")
    output.begin(["vllm", "--x"])
    output.feed(b"new\n")
    assert output.path.read_text() == "old\n--- vllm --x\nnew\n"
    assert "old" not in output.tail()


def test_a_run_that_printed_nothing_says_so(output):
    assert "(it printed nothing)" in output.tail()


def test_bytes_that_are_no_text_do_no_harm(output):
    output.feed(b"\xff\xfe ok\n")
    assert output.last_line.endswith(" ok")


def test_the_file_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab_server.engines.process.MAX_LOG_BYTES", 10_000)
    output = Output("m", tmp_path / "m.log", echo=False)
    output.feed((b"x" * 99 + b"\n") * 1000)
    output.close()
    assert 10_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000


def test_lines_can_be_echoed_into_the_gateways_log(tmp_path, caplog):
    caplog.set_level("INFO", logger="trimtab_server")
    output = Output("m", tmp_path / "m.log", echo=True)
    output.feed(b"hello\n")
    output.close()
    assert caplog.messages == ["[m] hello"]
