"""How many tokens an answer says that it took, read from its end alone."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

TAIL_BYTES = 8192
# Within a text of JSON the quotes are escaped, so that what a model writes is not taken for it.
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_NAMES = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


class Usage(NamedTuple):
    """Tokens; None where the answer does not say."""

    prompt: int | None = None
    completion: int | None = None


class UsageScanner:
    """The last bytes of a body that passes through, at least `TAIL_BYTES` of them where there are so many."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> None:
        """Take a piece; costs as good as nothing, whatever its length."""
        self._bytes += piece[-TAIL_BYTES:]
        if len(self._bytes) > 2 * TAIL_BYTES:
            del self._bytes[:-TAIL_BYTES]

    def usage(self) -> Usage:
        """What the last `usage` says, of an answer or of the events of a stream.

        OpenAI's prompt_tokens and completion_tokens, or input_tokens and output_tokens.
        """
        ends = [match.end() for match in _USAGE.finditer(self._bytes)]
        return _counts(self._bytes[ends[-1] :].decode(errors="replace")) if ends else Usage()


def _counts(text: str) -> Usage:
    try:
        usage, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return Usage()
    return Usage(*(_first_number(usage, names) for names in _NAMES))


def _first_number(usage: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((usage[name] for name in names if type(usage.get(name)) is int), None)
