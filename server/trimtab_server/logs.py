"""The gateway's log: lines of text, or JSON objects."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

FIELDS = "fields"
"""Where a record has what it says as data: `extra={FIELDS: {...}}`."""
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; a record's fields; `exception`, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def set_up_logging(level: str, style: Literal["text", "json"]) -> None:
    """Send every logger's lines to stderr; those of libraries that would format their own too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # Its debug level tells of every packet.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    _take_over_transformers()


def _take_over_transformers() -> None:
    from transformers.utils import logging as own  # noqa: PLC0415 - heavy

    own.disable_default_handler()
    own.enable_propagation()
