"""Processes, as tests ask after them."""

from __future__ import annotations

import re
from pathlib import Path


def lives(pid: int) -> bool:
    """Whether there is such a process; one that only waits for its parent to take note of its end is none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return re.search(r"^State:\s+[ZX]", status, re.MULTILINE) is None


def parent_of(pid: int) -> int:
    """The id of the parent process."""
    found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])
