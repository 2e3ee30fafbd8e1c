"""A real Prometheus as its own process, for tests, and its HTTP API."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serving import free_port, wait_until_answers

START_SECONDS = 30
STOP_SECONDS = 30


class Prometheus:
    """A client of the one that runs at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **parameters: str | float) -> Any:
        """What its API answers below /api/v1; an error is a failed assertion."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def at(self, time: float, query: str) -> list[float]:
        """All values that a query finds."""
        return [float(series["value"][1]) for series in self.ask("query", query=query, time=time)["result"]]

    def between(self, start: float, end: float, query: str) -> list[float]:
        """All values that a query finds, once a second."""
        found = self.ask("query_range", query=query, start=start, end=end, step=1)["result"]
        return [float(value) for series in found for _, value in series["values"]]

    def label_values(self, selector: str, label: str) -> list[str]:
        """What a label says in the series that a selector finds."""
        return self.ask(f"label/{label}/values", **{"match[]": selector})


@contextlib.contextmanager
def prometheus(directory: Path, config: dict) -> Iterator[Prometheus]:
    """Run one in `directory`, to which the paths of `config` are relative, until the block ends."""
    path, address = directory / "prometheus.yml", f"127.0.0.1:{free_port()}"
    path.write_text(yaml.safe_dump(config))
    command = [
        *("prometheus", f"--config.file={path}", f"--storage.tsdb.path={directory / 'data'}"),
        f"--web.listen-address={address}",
    ]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_answers(f"http://{address}/-/ready", process, directory / "prometheus.log", START_SECONDS)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
