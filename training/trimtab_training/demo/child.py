"""A server as a child process: started, waited for, and ended whatever happens here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.5
START_SECONDS = 600.0
STOP_SECONDS = 60.0

States = dict[str, str]
"""model -> what the server says about it"""


class ServerError(RuntimeError):
    """The server ended, or did not become ready; the message ends in what it printed last."""


@contextmanager
def serving(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `trimtab serve` on `config` until the block ends, however it does; its output goes to `log`.

    It is not reached by an interrupt from the keyboard, but told to stop once, and killed if it does not.
    """
    command = [sys.executable, "-m", "trimtab_server", "serve", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> None:
    """Ask `process` to end; kill its session if it takes longer than `seconds`, or at an interrupt."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    report: Callable[[States], None],
    seconds: float = START_SECONDS,
) -> None:
    """Wait until the server at `url` says that all its models are ready.

    Raises:
        ServerError: it ended, gave a model up, or takes longer than `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode}{_last_lines(log)}")
        ready, states = _probe(url)
        report(states)
        if ready:
            return
        if failed := [model for model, state in states.items() if state == "failed"]:
            raise ServerError(f"the server could not start {', '.join(failed)}{_last_lines(log)}")
        time.sleep(POLL_SECONDS)
    raise ServerError(f"the server was not ready after {seconds:.0f} seconds{_last_lines(log)}")


def _probe(url: str) -> tuple[bool, States]:
    """Whether all models are ready, and the state of each; nothing is known before the server listens."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as response:  # noqa: S310 - our own child
            ready, body = True, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            ready, body = False, json.load(error)
    except OSError:
        return False, {}
    return ready, {model: entry["state"] for model, entry in body["models"].items()}


def _last_lines(log: Path, count: int = 20) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "\n".join([f"; the end of {log}:", *(f"  {line}" for line in lines)])
