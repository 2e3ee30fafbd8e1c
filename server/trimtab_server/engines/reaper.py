"""Runs a command, and sees to it that no process of it outlives it or the one who started it.

The gateway starts each replica through this module, in a session of its own, and holds the other end of the
pipe on its standard input. When the command ends, or the pipe closes (the gateway let go of it, or was killed
by whatever signal), every process of the group gets SIGTERM, and SIGKILL after a grace. This process is a
subreaper: it inherits orphans, and so knows when the last one has gone. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.02


def main(arguments: Sequence[str]) -> int:
    """Run `GRACE COMMAND...`, the grace in seconds.

    Returns:
        The command's exit status, or 128 + the signal that ended it.
    """
    grace, *command = arguments
    _become_subreaper()
    # The group's signals reach this process too. A handler, not SIG_IGN: the command would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    exited = os.pidfd_open(child.pid)
    select.select([sys.stdin, exited], [], [])
    # The command first, which may want to end its own children in order; `_reap` sees to the rest.
    os.kill(child.pid, signal.SIGTERM)
    return _reap(child.pid, float(grace))


def _become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _reap(command: int, grace: float) -> int:
    """Wait for all children, and after `grace` seconds kill them. Returns the status of `command`."""
    deadline = time.monotonic() + grace
    status = 0
    while True:
        try:
            pid, waited = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == command:
            code = os.waitstatus_to_exitcode(waited)
            status = 128 - code if code < 0 else code
            os.killpg(0, signal.SIGTERM)
        if pid == 0:
            if time.monotonic() > deadline:
                _kill_children()
            time.sleep(_POLL_SECONDS)


def _kill_children() -> None:
    """Kill the direct children; theirs become this process's own, and are killed in the next turn."""
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        os.killpg(0, signal.SIGKILL)
        return
    for child in children:
        os.kill(int(child), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
