"""The line that the log has for each request, and what it shows of one only if it is to."""

from __future__ import annotations

import json
import logging

import pytest

from trimtab_server.api.request_log import SHOWN_BODY_BYTES, RequestLog
from trimtab_server.logs import FIELDS
from trimtab_server.metrics import Metrics

CHAT = "/v1/chat/completions"
USAGE = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}'


@pytest.fixture
def log(caplog):
    """An log, by default of a chat, whose log is kept."""
    caplog.set_level(logging.INFO, logger="trimtab_server")

    def log(path: str = CHAT, **options) -> RequestLog:
        return RequestLog(Metrics(), "POST", path, "id-1", **options)

    return log


def answer(log: RequestLog, *pieces: bytes, status: int = 200, **headers: str) -> None:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    log.sent({"type": "http.response.start", "status": status, "headers": raw})
    for piece in pieces:
        log.sent({"type": "http.response.body", "body": piece, "more_body": True})
    log.finish()


def test_the_line_says_what_became_of_a_request(log, caplog):
    log = log()
    log.routed("m")
    answer(log, USAGE, x_trimtab_control="manners=0.5")
    (record,) = caplog.records
    fields = getattr(record, FIELDS)
    assert record.getMessage() == (
        "id-1 POST /v1/chat/completions model=m control=manners=0.5 status=200"
        f" seconds={fields['seconds']} first_byte={fields['first_byte']} prompt_tokens=3 completion_tokens=5"
    )
    assert 0 <= fields["first_byte"] <= fields["seconds"] < 1
    assert fields["prompt_tokens"] == 3


def test_what_is_not_known_is_a_dash_and_null(log, caplog):
    log().finish()
    (record,) = caplog.records
    assert "model=- control=- status=499 " in record.getMessage()
    assert record.getMessage().endswith(" first_byte=- prompt_tokens=- completion_tokens=-")
    assert getattr(record, FIELDS)["first_byte"] is None


def test_a_stream_says_its_tokens_at_its_end(log, caplog):
    pieces = [b'data: {"usage": null}\n\n'] * 5000
    answer(log(), *pieces, b"data: " + USAGE + b"\n\n", b"data: [DONE]\n\n")
    assert caplog.records[0].getMessage().endswith("prompt_tokens=3 completion_tokens=5")


def test_nothing_of_a_body_is_in_the_log(log, caplog):
    log = log()
    log.received(b"secret")
    answer(log, b"secret")
    assert "secret" not in caplog.text


def test_a_body_is_shown_where_it_is_to_be_on_one_line_and_not_whole(log, caplog):
    log = log(shows_body=True)
    body = b"begins\nid-2 POST /forged" + b"x" * SHOWN_BODY_BYTES + b"ends"
    log.received(body)
    (record,) = caplog.records
    assert record.getMessage().startswith(f'id-1 bytes={len(body)} body="begins\\nid-2 POST /forged')
    assert "\n" not in record.getMessage()
    assert len(getattr(record, FIELDS)["body"]) == SHOWN_BODY_BYTES
    assert "ends" not in caplog.text


@pytest.mark.parametrize("body", [b"\xff\xfe", "ä".encode()[:1]])
def test_a_body_need_not_be_text(log, body):
    log(shows_body=True).received(body)


def test_probes_are_in_no_log_but_a_debuggers(log, caplog):
    answer(log("/health"), b"{}")
    assert caplog.records == []


def test_the_gateway_logs_each_request_with_its_tokens(start, pack, caplog):
    caplog.set_level(logging.INFO, logger="trimtab_server")
    start(controls={"one": str(pack)}).chat(model="m", control={"name": "one", "strength": 0.7})
    fields = [getattr(record, FIELDS) for record in caplog.records if hasattr(record, FIELDS)]
    assert [(f["control"], f["prompt_tokens"], f["completion_tokens"]) for f in fields] == [("one=0.7", 1, 2)]
    assert json.dumps(fields)
