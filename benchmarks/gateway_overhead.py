"""What the gateway costs: one worker addressed directly, through the gateway, and through LiteLLM's proxy.

A real engine with a model of the small world, which is so fast that the servers around it are all that is
measured, or with one of 322 M parameters. Short requests one after the other, in turn by each way; then
many streams at once, in turn by each way. Only what was measured within seconds of each other is compared.
The worker is one elsewhere, on a port, which LiteLLM's proxy can reach too; or, without LiteLLM, one that
the gateway has started, on its unix socket.
The client, all servers and the engine share the machine's cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
import yaml
from rich.console import Console
from rich.table import Table

from gateways import WORLD, free_port, gateway, the_world
from models import make_model
from serving import START_SECONDS, STOP_SECONDS
from trimtab_training.world.world import World
from vocabularies import real

MODEL = "a"
DIRECT, OURS, LITELLM = "direct", "gateway", "litellm"
ADDED_GOAL = 3.0  # ms, of a short request at the median
THROUGHPUT_GOAL = 0.97  # of that of streams to the worker directly
PATH = "/v1/completions"
PROXY = Path(".venv-clients/bin/litellm")
KEY = f"sk-{secrets.token_urlsafe(24)}"
"""Of LiteLLM's proxy, which does not start without one."""

SOCKET = "unix:"
"""Stands before an address that is a socket's path."""


class Way(StrEnum):
    """How the worker is reached."""

    PORT = "port"
    SOCKET = "socket"


Series = dict[str, list[float]]
"""A figure of each round, by way."""


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    requests: Annotated[int, typer.Option(min=1, help="Short requests by each way, in each round.")] = 60,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 128,
    *,
    way: Annotated[Way, typer.Option(help="To the worker; LiteLLM's proxy knows no sockets.")] = Way.PORT,
    large: Annotated[bool, typer.Option(help="The model of 322 M parameters.")] = False,
    world: Annotated[Path, typer.Option(help="The small world; made where it is not there.")] = WORLD,
    stand_in: Annotated[Path | None, typer.Option(help="A program in the place of vLLM.")] = None,
) -> None:
    """Measure, and compare."""
    made = the_world(world)
    with contextlib.ExitStack() as stack:
        place = made.models[MODEL]
        if large:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_model(place, "target", real("mistral-v1", place))
        reach = on_its_socket if way is Way.SOCKET else on_a_port
        addresses = stack.enter_context(reach(made, place, stand_in))
        latencies, throughputs = asyncio.run(measure(addresses, rounds, requests, (streams, tokens)))
    results: dict[str, dict[str, Any]] = {
        name: {
            "latency_ms": statistics.median(latencies[name]),
            "added_ms": compared(latencies, name, lambda ours, direct: ours - direct),
            "tokens_per_second": statistics.median(throughputs[name]),
            "throughput_ratio": compared(throughputs, name, lambda ours, direct: ours / direct),
        }
        for name in latencies
    }
    print_table(results)
    goals = {
        "added": results[OURS]["added_ms"]["median"] <= ADDED_GOAL,
        "throughput": results[OURS]["throughput_ratio"]["median"] >= THROUGHPUT_GOAL,
    }
    sizes = {
        "way": way,
        "large": large,
        "rounds": rounds,
        "requests": requests,
        "streams": streams,
        "tokens": tokens,
    }
    print(json.dumps({"benchmark": "gateway_overhead", **sizes, "goals_met": goals, "results": results}))


async def measure(
    addresses: Mapping[str, str | None], rounds: int, requests: int, load: tuple[int, int]
) -> tuple[Series, Series]:
    """Of each round and way: milliseconds of a short request at the median; tokens a second of streams."""
    async with contextlib.AsyncExitStack() as stack:
        ways = {
            name: await stack.enter_async_context(
                session_of(address, headers={"authorization": f"Bearer {KEY}"})
            )
            for name, address in addresses.items()
            if address
        }
        latencies: Series = {name: [] for name in ways}
        throughputs: Series = {name: [] for name in ways}
        for number in range(rounds + 1):
            short: Series = {name: [] for name in ways}
            for _ in range(requests):
                for name, session in ways.items():
                    short[name].append(await milliseconds(session))
            streamed = {name: await throughput(ways[name], *load) for name in rotated([*ways], number)}
            if number:  # the first round only warms up
                for name in ways:
                    latencies[name].append(statistics.median(short[name]))
                    throughputs[name].append(streamed[name])
    return latencies, throughputs


def session_of(address: str, **options: Any) -> aiohttp.ClientSession:
    """A client of a URL, or of a socket."""
    if address.startswith(SOCKET):
        connector = aiohttp.UnixConnector(address.removeprefix(SOCKET), limit=0)
        return aiohttp.ClientSession("http://worker", connector=connector, **options)
    return aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0), **options)


def body(tokens: int, *, stream: bool) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": "Lukas lives in",
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        **({"ignore_eos": True} if stream else {}),
    }


async def milliseconds(session: aiohttp.ClientSession) -> float:
    """Of one short request."""
    started = time.perf_counter()
    async with session.post(PATH, json=body(1, stream=False)) as response:
        text = await response.text()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {text}")
    return (time.perf_counter() - started) * 1e3


async def throughput(session: aiohttp.ClientSession, streams: int, tokens: int) -> float:
    """Tokens a second of streams that begin at once."""
    started = time.perf_counter()
    await asyncio.gather(*(read_stream(session, tokens) for _ in range(streams)))
    return streams * tokens / (time.perf_counter() - started)


async def read_stream(session: aiohttp.ClientSession, tokens: int) -> None:
    async with session.post(PATH, json=body(tokens, stream=True)) as response:
        text = await response.text()
    if response.status != 200 or "data: [DONE]" not in text:
        raise RuntimeError(f"{response.status}: {text[-300:]}")


@contextlib.contextmanager
def on_a_port(made: World, model: Path, stand_in: Path | None) -> Iterator[dict[str, str | None]]:
    """The addresses of a worker elsewhere, of a gateway and of LiteLLM's proxy in front of it."""
    with worker(model, stand_in) as behind:
        there = {"models": {MODEL: {"replicas": [{"url": behind}], "controls": []}}, "log_level": "warning"}
        with gateway(made, [], None, there) as running, proxy(behind) as litellm:
            yield {DIRECT: behind, OURS: running.url, LITELLM: litellm}


@contextlib.contextmanager
def on_its_socket(made: World, model: Path, stand_in: Path | None) -> Iterator[dict[str, str | None]]:
    """The addresses of a worker that the gateway has started, and of the gateway."""
    settings = {"controls": {}, "log_level": "warning"}
    with gateway(made, [MODEL], stand_in, settings, {MODEL: model}) as running:
        yield {DIRECT: f"{SOCKET}{running.socket(0)}", OURS: running.url}


@contextlib.contextmanager
def worker(model: Path, stand_in: Path | None) -> Iterator[str]:
    """A vLLM server on a port, which all ways lead to; gives its address."""
    port = free_port()
    program = [str(stand_in)] if stand_in else ["-m", "vllm.entrypoints.openai.api_server"]
    command = [
        *(sys.executable, *program, "--model", str(model), "--served-model-name", MODEL),
        *("--port", str(port), "--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    with _server(command, environment, port, "/health") as address:
        yield address


@contextlib.contextmanager
def proxy(behind: str) -> Iterator[str | None]:
    """LiteLLM's proxy in front of the worker, where it is installed (`make setup`)."""
    if not PROXY.exists():
        Console(stderr=True).print(f"{PROXY} is not there: without LiteLLM", highlight=False)
        yield None
        return
    parameters = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{behind}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": MODEL, "litellm_params": parameters}]}
    environment = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks for a list of prices
        "LITELLM_LOG": "ERROR",
        "LITELLM_MASTER_KEY": KEY,
    }
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(PROXY), "--config", str(path), "--port", str(port), "--host", "127.0.0.1"]
        with _server(command, environment, port, "/health/liveliness") as address:
            yield address


@contextlib.contextmanager
def _server(command: Sequence[str], environment: Mapping[str, str], port: int, health: str) -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            if not asyncio.run(_answers(address + health, process)):
                log.seek(0)
                raise RuntimeError(f"{command[0]} did not start:\n{log.read().decode()[-3000:]}")
            yield address
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


async def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a server does; false where it ends instead, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.5)
    return False


def compared(values: Series, name: str, how: Callable[[float, float], float]) -> dict[str, float]:
    """A way against the direct one, round by round."""
    found = [how(ours, direct) for ours, direct in zip(values[name], values[DIRECT], strict=True)]
    return {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}


def rotated(names: list[str], by: int) -> list[str]:
    return [*names[by % len(names) :], *names[: by % len(names)]]


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("way", "short request, ms", "added", "spread", "tokens/s", "ratio", "spread")
    table = Table(*columns, title="The same worker by each way")
    for name, row in results.items():
        added, ratio = row["added_ms"], row["throughput_ratio"]
        table.add_row(
            name,
            f"{row['latency_ms']:.2f}",
            f"{added['median']:.2f}",
            f"{added['lowest']:.2f} to {added['highest']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{ratio['median']:.3f}",
            f"{ratio['lowest']:.3f} to {ratio['highest']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
