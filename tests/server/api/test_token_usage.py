"""How many tokens an answer took, read from its end."""

from __future__ import annotations

import json

import pytest

from trimtab_server.api.token_usage import TAIL_BYTES, Usage, UsageScanner

CHAT = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "prompt_tokens_details": {"cached": 1}}


def usage_of(*pieces: bytes) -> Usage:
    tail = UsageScanner()
    for piece in pieces:
        tail.feed(piece)
    return tail.usage()


@pytest.mark.parametrize("names", [("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens")])
@pytest.mark.parametrize("after", [{}, {"prompt_logprobs": None, "user": "me"}])
def test_an_answer_says_it_in_its_usage(names, after):
    usage = dict(zip(names, (3, 5), strict=True))
    assert usage_of(json.dumps({"choices": [], "usage": usage, **after}).encode()) == (3, 5)


def test_of_a_stream_the_last_usage_counts():
    events = [{"usage": None}, {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}, {"usage": CHAT}]
    pieces = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    assert usage_of(*pieces, b"data: [DONE]\n\n") == (3, 5)


def test_where_pieces_are_cut_does_not_matter():
    text = json.dumps({"usage": CHAT}).encode()
    assert usage_of(*(text[i : i + 1] for i in range(len(text)))) == (3, 5)


@pytest.mark.parametrize("pieces", [[b"x" * 10**6], [b"x" * 100] * 10**4])
def test_of_a_long_answer_only_its_end_is_kept(pieces):
    tail = UsageScanner()
    for piece in [*pieces, json.dumps({"usage": CHAT}).encode()]:
        tail.feed(piece)
    assert len(tail._bytes) <= 2 * TAIL_BYTES
    assert tail.usage() == (3, 5)


def test_what_only_one_side_says_is_known_of_that_one():
    assert usage_of(b'{"usage": {"prompt_tokens": 3, "total_tokens": 3}}') == (3, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"usage": null}',
        b'{"usage": {"prompt_to',
        b'{"usage": {"prompt_tokens": "3", "completion_tokens": true}}',
        b'{"usage": {' + b'"a": {' * 1000,
        b"\xff\xfe",
    ],
)
def test_what_an_answer_does_not_say_is_not_known(body):
    assert usage_of(body) == (None, None)


def test_a_text_about_a_usage_is_none():
    text = json.dumps({"text": json.dumps({"usage": {"prompt_tokens": 9, "completion_tokens": 9}})})
    assert usage_of(text.encode()) == (None, None)
