"""A command under the launcher: none of its processes outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from processes import lives

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""
POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep(60)
"""
# A child that prints its own id, and a grandchild's that does not listen to SIGTERM.
FAMILY = f"""
import subprocess, sys, os, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(os.getpid(), child.pid, flush=True)
"""


@pytest.fixture
def launch():
    """Start code under the launcher; it is killed after the test, with all its group."""
    launched = []

    def launch(code: str, grace: float = 10) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "trimtab_server.engines.reaper",
            str(grace),
            sys.executable,
            "-c",
            code,
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        launched.append(process)
        return process

    yield launch
    for process in launched:
        process.stdin.close()
        process.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gone(*pids: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(lives, pids))


@pytest.mark.parametrize(
    ("code", "status"), [("", 0), ("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_it_ends_with_the_commands_status(launch, code, status):
    assert launch(code).wait(10) == status


def test_the_command_gets_no_input(launch):
    assert launch("import sys; print(repr(sys.stdin.read()))").stdout.read() == "''\n"


def test_when_the_pipe_closes_the_command_may_end_in_its_own_way(launch):
    process = launch(POLITE)
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(5) == 7


def test_a_process_that_will_not_end_is_killed_after_the_grace(launch):
    process = launch(STUBBORN, grace=0.3)
    process.stdout.readline()
    begun = time.monotonic()
    process.stdin.close()
    assert process.wait(5) == 128 + signal.SIGKILL
    assert 0.3 <= time.monotonic() - begun < 3


def test_what_the_command_leaves_behind_is_ended_with_it(launch):
    process = launch(FAMILY, grace=0.3)
    parent, child = map(int, process.stdout.readline().split())
    process.wait(5)
    assert not lives(parent)
    assert not lives(child)


def test_children_end_when_the_pipe_closes(launch):
    process = launch(FAMILY + "time.sleep(60)", grace=0.3)
    parent, child = map(int, process.stdout.readline().split())
    process.stdin.close()
    process.wait(5)
    assert not lives(parent)
    assert not lives(child)


def test_the_death_of_the_starter_by_any_signal_is_the_end():
    code = FAMILY + "time.sleep(60)"
    starter = f"""
import subprocess, sys, time
process = subprocess.Popen(
    [sys.executable, "-m", "trimtab_server.engines.reaper", "0.3", sys.executable, "-c", {code!r}],
    stdin=subprocess.PIPE, start_new_session=True,
)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(*pids)
