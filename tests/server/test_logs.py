"""The log as JSON: whatever is logged, one object a line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from trimtab_server.logs import FIELDS, JsonFormatter


@pytest.fixture
def written():
    """A logger of the test's own, and the objects that it wrote."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    handler = Kept()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("some.module")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logger, lines
    logger.removeHandler(handler)


def test_an_entry_says_when_how_grave_and_where_from(written):
    logger, lines = written
    logger.warning("%s is on\nfire: \u00e4", "it")
    (entry,) = map(json.loads, lines)
    assert entry.pop("time")[10:11] == "T"
    assert entry == {"level": "warning", "logger": "some.module", "message": "it is on\nfire: \u00e4"}
    assert "\n" not in lines[0]


def test_data_stand_beside_the_message(written):
    logger, lines = written
    logger.info("it", extra={FIELDS: {"status": 200, "model": None}})
    entry = json.loads(lines[0])
    assert (entry["status"], entry["model"]) == (200, None)


def test_a_traceback_is_inside_the_object(written):
    logger, lines = written
    try:
        int("one")
    except ValueError:
        logger.exception("failed", stack_info=True)
    (entry,) = map(json.loads, lines)
    assert entry["message"] == "failed"
    assert entry["exception"].endswith("ValueError: invalid literal for int() with base 10: 'one'")
    assert "test_logs" in entry["stack"]


def test_libraries_and_warnings_write_the_same_lines():
    program = """
import logging, warnings
from trimtab_server.logs import set_up_logging
set_up_logging("info", "json")
logging.getLogger("transformers.some").warning("one")
logging.getLogger("uvicorn.error").info("two")
warnings.warn("three")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert messages[:2] == ["one", "two"]
    assert "three" in messages[2]


def test_every_line_of_a_gateway_is_an_object(serve):
    gateway = serve(log_format="json").wait_until_ready()
    gateway.get("/version")
    assert gateway.stop() == 0
    entries = [json.loads(line) for line in gateway.log.splitlines()]
    (request,) = [entry for entry in entries if entry.get("endpoint") == "/version"]
    assert (request["model"], request["status"]) == ("m", 202)
    assert {"uvicorn.error", "trimtab_server.api.request_log"} <= {entry["logger"] for entry in entries}
