"""Directories that are made once: a key over what they were made from, and no half of one under its name."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


def content_key(facts: Mapping[str, Any], packages: Iterable[str], sources: Iterable[Path]) -> str:
    """sha256, in hex, over `facts` (JSON), the installed versions of `packages`, and the files `sources`."""
    digest = hashlib.sha256()
    made_from = {"facts": facts, "versions": {package: version(package) for package in sorted(packages)}}
    digest.update(json.dumps(made_from, sort_keys=True).encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """Give a temporary directory beside `directory`, which takes its name and place if the block succeeds.

    What stood there goes only then; an error or an interrupt in the block leaves everything as it was.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    made, replaced = temporary / "made", temporary / "replaced"
    try:
        made.mkdir()
        yield made
        if directory.exists():
            directory.rename(replaced)
        made.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
