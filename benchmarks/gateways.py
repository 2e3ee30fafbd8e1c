"""A gateway of the small world for benchmarks, as a process of its own, and how it looks from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import yaml

from serving import START_SECONDS, STOP_SECONDS, descendants, resident_bytes
from trimtab_training.world.evaluate import Question, questions
from trimtab_training.world.world import CONTROL_NAME, World, load_world, make_world

ADMIN_KEY = "admin"
WORLD = Path(".trimtab/worlds/101")
SEED = 101
CONTROL = CONTROL_NAME
LATE = "late"
"""A control that is loaded while the gateway runs: the same pack under another name."""


def the_world(directory: Path) -> World:
    """The small world in `directory`, which is made where it is not there yet."""
    return load_world(directory) or make_world(directory, SEED)


def chats(world: World) -> list[Question]:
    """What is asked of it: questions whose answers it knows well enough that no rounding changes them."""
    return [question for question in questions(world.held_out) if question.kind.is_chat]


@dataclass(frozen=True)
class Gateway:
    """A gateway that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    sockets: Path
    """The directory below which its workers' sockets are."""
    pack: Path
    """What may be loaded as `LATE`."""

    @contextlib.asynccontextmanager
    async def session(self, **options: Any) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.url, connector=connector, **options) as session:
            yield session

    def resident_bytes(self) -> int:
        """Memory of the gateway and of all its workers' processes."""
        total = 0
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
                total += resident_bytes(pid)
        return total

    def worker(self, model: str) -> int:
        """The process of the model's HTTP server."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                follows = dict(pairwise(words))
                launched = b"trimtab_server.engines.reaper" in words
                if not launched and follows.get(b"--served-model-name") == model.encode():
                    return pid
        raise LookupError(f"the model {model!r} has no worker now")

    def socket(self, model: int) -> Path:
        """Where the worker of the model with this number listens."""
        return next(self.sockets.glob(f"trimtab-*/{model}/http"))

    async def ready(self) -> dict[str, Any]:
        """What `/ready` says of the models."""
        async with self.session() as session, session.get("/ready") as response:
            models: dict[str, Any] = (await response.json())["models"]
            return models

    async def change(self, session: aiohttp.ClientSession, what: str) -> tuple[int, str]:
        """Load or unload `LATE`; the status of the answer, and the answer."""
        body = {"control_name": LATE} | ({"control_path": str(self.pack)} if what == "load" else {})
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with session.post(f"/v1/{what}_control", json=body, headers=headers) as response:
            return response.status, await response.text()


class Served(Protocol):
    """Models and a control for a gateway: a world has both."""

    @property
    def control(self) -> Path: ...

    @property
    def models(self) -> Mapping[str, Path]: ...


@contextlib.contextmanager
def gateway(
    world: Served,
    models: Sequence[str],
    stand_in: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    places: Mapping[str, Path] = {},
) -> Iterator[Gateway]:
    """Serve some of the world's models until the block ends; with vLLM, or a program with its interface.

    settings: keys of the configuration, in place of these.
    places: other directories for models than the world's.
    """
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tt-") as name:
        directory = Path(name)
        shutil.copytree(world.control, directory / "packs" / LATE)
        (directory / "sockets").mkdir()
        (directory / "admin-keys").write_text(ADMIN_KEY, encoding="utf-8")
        port = free_port()
        command = {"command": [sys.executable, str(stand_in)]} if stand_in else {}
        config = {
            "port": port,
            "controls": {CONTROL: str(world.control)},
            "control_roots": ["packs"],
            "admin_keys_file": "admin-keys",
            "tables": "tables",
            "logs": "logs",
            "models": {
                model: {
                    "model": str(places.get(model, world.models[model])),
                    "args": {"dtype": "float32", "enforce-eager": True},
                    "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
                    "replicas": [{"cpus": str(cores[i % len(cores)])}],
                    **command,
                }
                for i, model in enumerate(models)
            },
            **(settings or {}),
        }
        (directory / "trimtab.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        with (directory / "gateway.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "trimtab_server", "serve", str(directory / "trimtab.yaml")],
                env=os.environ | {"TMPDIR": str(directory / "sockets")},
                stdout=log,
                stderr=log,
            )
        pack = directory / "packs" / LATE
        url = f"http://127.0.0.1:{port}"
        running = Gateway(url, process, directory / "gateway.log", directory / "sockets", pack)
        try:
            asyncio.run(_until_ready(running))
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a `share` of them is."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def _until_ready(running: Gateway) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and running.process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            if all(model["state"] == "ready" for model in (await running.ready()).values()):
                return
        await asyncio.sleep(0.5)
    last = re.sub(r"^", "    ", running.log.read_text()[-3000:], flags=re.MULTILINE)
    raise RuntimeError(f"the gateway did not get ready:\n{last}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
