"""Stock vLLM servers for benchmarks, and the load that they are driven with.

An engine's worker process has the first core. vLLM's API server and its EngineCore process, which polls while
a step runs, share what is left with the client, and with the control where it runs beside the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from models import CONTEXT, Models, token_bytes

START_SECONDS = 400
STOP_SECONDS = 60
# For a second after its last message a process of vLLM's polls (SpinCondition), on a core that others need.
SETTLE_SECONDS = 1.2
_BLOCK = 128  # tokens in a block of vLLM's cache on CPUs
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Cores:
    """Which core does what; with two of them, the control's is also that of everything but the engine."""

    engine: int
    control: int
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores:
        available = sorted(os.sched_getaffinity(0))
        if len(available) < 2:
            raise RuntimeError("two cores are needed: one for the engine, one for the rest")
        engine, control = available[0], available[-1]
        return cls(engine, control, frozenset(available[1:-1] or [control]))


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run this thread on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Load:
    """Requests that begin at once."""

    size: int
    prompt: int
    """Tokens of each prompt."""
    tokens: int
    """Tokens that each generates."""
    seed: int
    """Of the prompts: no two rounds have the same, lest something is still cached."""

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[1, *rng.choices(range(300, 31_000), k=self.prompt - 1)] for _ in range(self.size)]


@dataclass(frozen=True)
class Answer:
    """When the tokens of one request came."""

    first: float
    """Seconds until the first token."""
    step: float
    """Seconds for each token after it."""


@dataclass(frozen=True)
class Server:
    """A vLLM server on a unix socket."""

    socket: Path
    process: subprocess.Popen[bytes]

    def drive(self, load: Load, control: str | None = None) -> list[Answer]:
        """Send `load`, under `control` where one is named."""
        return asyncio.run(self._drive(load, control))

    def speed(self, load: Load, control: str | None = None) -> float:
        """Tokens a second while all requests decode.

        The pace of the request that began last: the others waited between their tokens while its prompt was
        read.
        """
        return load.size / max(self.drive(load, control), key=lambda answer: answer.first).step

    def first_token(self, load: Load, control: str | None = None) -> float:
        """Seconds until the median request's first token."""
        return statistics.median(answer.first for answer in self.drive(load, control))

    def metrics(self) -> str:
        return asyncio.run(self._metrics())

    def worker(self) -> int:
        """The id of the process that runs the models."""
        return next(pid for pid in descendants(self.process.pid) if _command(pid).startswith("VLLM::Worker"))

    def pin(self, cores: frozenset[int]) -> None:
        """Keep all processes but the worker on `cores`."""
        worker = self.worker()
        for pid in {self.process.pid, *descendants(self.process.pid)} - {worker}:
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)

    async def _drive(self, load: Load, control: str | None) -> list[Answer]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with aiohttp.ClientSession(connector=connector) as session:
            return await _generate(session, load, control)

    async def _metrics(self) -> str:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get("http://server/metrics") as response,
        ):
            return await response.text()


def counter(metrics: str, name: str, control: str) -> float:
    """The value of one of the plugin's counters for `control`; 0 where it has not counted yet."""
    pattern = rf'^{name}_total{{[^}}]*control="{control}"[^}}]*}} (\S+)$'
    return sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE))


async def _generate(session: aiohttp.ClientSession, load: Load, control: str | None) -> list[Answer]:
    """All requests in one body, so that they reach the engine together; sampled, so that the text is not one
    token over and over.
    """
    body = {
        "model": "m",
        "prompt": load.prompts(),
        "max_tokens": load.tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"vllm_xargs": {"trimtab_control": control}} if control else {}),
    }
    start = time.perf_counter()
    times: defaultdict[int, list[float]] = defaultdict(list)
    event: dict[str, Any] = {}
    async with session.post("http://server/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                for choice in event.get("choices", ()):
                    times[choice["index"]].append(time.perf_counter() - start)
    if event.get("usage", {}).get("completion_tokens") != load.size * load.tokens:
        raise RuntimeError(f"expected {load.size} times {load.tokens} tokens: {event}")
    return [Answer(came[0], (came[-1] - came[0]) / max(load.tokens - 1, 1)) for came in times.values()]


@contextlib.contextmanager
def servers(
    directory: Path, models: Models, plugins: Mapping[str, dict[str, Any] | None], largest: Load, cores: Cores
) -> Iterator[dict[str, Server]]:
    """Start a server for each of `plugins`: what its plugin is told, or None to go without.

    Args:
        directory: for sockets and logs.
        models: what they serve.
        plugins: by the server's name.
        largest: the most tokens at once that they have to keep in their caches.
        cores: which they run on.
    """
    # for each request whole blocks; one is vLLM's own
    blocks = largest.size * -(-(largest.prompt + largest.tokens) // _BLOCK) + 1
    space = math.ceil(blocks * _BLOCK * token_bytes("target") / 2**30)
    with contextlib.ExitStack() as stack:
        running = {}
        for name, plugin in plugins.items():
            (directory / name).mkdir()
            process = stack.enter_context(_process(directory / name, models, plugin, space, cores))
            running[name] = Server(directory / name / "socket", process)
        for name, server in running.items():
            if not asyncio.run(_answers(server)):
                last = (directory / name / "log").read_text()[-3000:]
                raise RuntimeError(f"the server {name!r} did not start:\n{last}")
        for server in running.values():
            server.pin(cores.others)
        yield running


@contextlib.contextmanager
def _process(
    directory: Path, models: Models, plugin: dict[str, Any] | None, space: int, cores: Cores
) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models.target)),
        *("--served-model-name", "m", "--uds", str(directory / "socket"), "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", str(CONTEXT), "--no-async-scheduling"),
        *("--no-enable-prefix-caching", "--logprobs-mode", "processed_logprobs"),
        # the first token at once, the others with the last: reading streams would take the control's core
        *("--stream-interval", str(CONTEXT)),
    ]
    if plugin is not None:
        command += ["--additional-config", json.dumps({"trimtab": plugin})]
        command += ["--logits-processors", "trimtab_processors:ControlProcessor"]
    (directory / "metrics").mkdir()
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": str(space),  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": str(cores.engine),
        "PROMETHEUS_MULTIPROC_DIR": str(directory / "metrics"),
    }
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)


async def _answers(server: Server) -> bool:
    """Wait until the server answers; false where it ends instead, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(server.socket))) as session:
        while time.monotonic() < deadline and server.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get("http://server/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(_POLL_SECONDS)
    return False


def descendants(pid: int) -> list[int]:
    """The processes below `pid`."""
    children = [child for child, parent in _parents() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


def _parents() -> Iterator[tuple[int, int]]:
    """Each process and its parent."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            found = re.search(r"^PPid:\s+(\d+)", status.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                yield int(status.parent.name), int(found[1])


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024
