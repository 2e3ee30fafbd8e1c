"""A request as the gateway sends it to a worker."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Call:
    """One request to a worker; `target` is the path and the query as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes | BinaryIO
    """A file can be sent more than once, each time from its beginning."""

    def open_body(self) -> BinaryIO | None:
        """Open the body, if there is one; the caller closes it.

        From a file, aiohttp sends it in pieces, between which other requests go on. It closes what it has
        sent, so it gets a file of its own.
        """
        if isinstance(self.body, bytes):
            return io.BytesIO(self.body) if self.body else None
        file = os.fdopen(os.dup(self.body.fileno()), "rb")
        file.seek(0)
        return file
