"""One run of a replica: its process group, and what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

from trimtab_server.engines.vllm.errors import EXPLANATIONS

logger = logging.getLogger(__name__)

TAIL_LINES = 50
MAX_LOG_BYTES = 16 * 2**20
_KILL_MARGIN_SECONDS = 5


class Output:
    """What a replica prints: in a file, its last lines at hand, and on request in the gateway's own log."""

    def __init__(self, name: str, path: Path, *, echo: bool) -> None:
        self.path = path
        self._name = name
        self._echo = echo
        self._file = RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._begun = b""
        self._meaning = ""

    @property
    def last_line(self) -> str:
        return self._tail[-1] if self._tail else ""

    def tail(self) -> str:
        """The last lines, for an error message."""
        lines = "\n".join(f"    {line}" for line in self._tail) or "    (it printed nothing)"
        return f"{self._meaning}the last lines of {self.path}:\n{lines}"

    def begin(self, command: Sequence[str]) -> None:
        """Mark the start of a run, and forget the lines of the one before."""
        self._tail.clear()
        self._begun, self._meaning = b"", ""
        self._write(f"--- {' '.join(command)}")

    def feed(self, data: bytes) -> None:
        """Take a piece of output, which may end within a line."""
        *lines, self._begun = re.split(rb"[\r\n]+", self._begun + data)
        for line in lines:
            if line:
                self._take(line.decode(errors="replace"))

    def close(self) -> None:
        self._file.close()

    def _take(self, line: str) -> None:
        self._tail.append(line)
        for said, meaning in EXPLANATIONS.items():
            if said in line:
                self._meaning = f"{meaning}; "
        self._write(line)
        if self._echo:
            logger.info("[%s] %s", self._name, line)

    def _write(self, line: str) -> None:
        self._file.emit(logging.makeLogRecord({"msg": line}))


class ReplicaProcess:
    """A replica's processes, all in one group; `end` leaves none of them."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, grace: float) -> None:
        self._process = process
        self._lifeline: int | None = lifeline
        self._grace = grace
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str], output: Output, grace: float
    ) -> ReplicaProcess:
        """Start `command`; `grace` is the seconds its processes have to end in after SIGTERM."""
        output.begin(command)
        lifeline_end, lifeline = os.pipe()
        printed, printed_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "trimtab_server.engines.reaper", str(grace), *command),
                stdin=lifeline_end,
                stdout=printed_end,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            os.close(printed)
            raise
        finally:
            os.close(lifeline_end)
            os.close(printed_end)
        started = cls(process, lifeline, grace)
        started._pump = asyncio.create_task(_pump(printed, output))
        return started

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for the end of all its processes; returns the command's exit status, or 128 + its signal."""
        return await self._process.wait()

    async def end(self) -> None:
        """End all its processes, gently at first, and take in what they still print."""
        with contextlib.suppress(ProcessLookupError):
            # A launcher that is stopped could end nothing. The others it kills, stopped or not.
            self._process.send_signal(signal.SIGCONT)
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        try:
            async with asyncio.timeout(self._grace + _KILL_MARGIN_SECONDS):
                status = await self._process.wait()
        except TimeoutError:
            status = -signal.SIGKILL
        if status < 0:
            # The launcher was killed, so it has not seen to the rest.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._pump is not None:
            # A process that left the group may hold the pipe open for ever.
            await asyncio.wait({self._pump}, timeout=_KILL_MARGIN_SECONDS)
            self._pump.cancel()


async def _pump(descriptor: int, output: Output) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        while data := await reader.read(2**16):
            output.feed(data)
    finally:
        transport.close()
