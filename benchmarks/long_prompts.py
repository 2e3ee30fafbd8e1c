"""Do long prompts hold up other requests? Requests of 1 to 30 MB under a control, beside small ones.

Three models of the small world behind one gateway. Two get small controlled requests all the while, first
alone, then while a process of its own sends the third large ones, several at once: long texts, a hundred
thousand messages, lists instead of messages, images, texts short enough to be tokenized, and bodies without
control. Held: the small requests' p99, `/health`, the memory before and after, and that no worker
is restarted.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.table import Table

from gateways import CONTROL, WORLD, Gateway, chats, gateway, percentile, the_world

SMALL, LARGE = ("a", "b"), "c"
P99_GOAL = 3.0  # times the p99 alone
HEALTH_GOAL = 0.25  # s
MEMORY_GOAL = 1.05  # times the memory before
SETTLE_SECONDS = 3
HEALTH_SECONDS = 0.02
PAUSE_SECONDS = 0.05
"""Between two small requests of a model."""
SHORT_ENOUGH = 500
"""Bytes of a text that is tokenized: more would exceed the context of the small world's models."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Case = tuple[str, bytes]
"""The endpoint and the body."""


def main(
    requests: Annotated[int, typer.Option(min=1, help="Large requests.")] = 200,
    at_once: Annotated[int, typer.Option(min=1)] = 8,
    alone: Annotated[float, typer.Option(min=1, help="Seconds of small requests alone.")] = 60,
    largest: Annotated[float, typer.Option(min=1, help="Megabytes of the largest.")] = 30,
    *,
    world: Annotated[Path, typer.Option(help="The small world; made where it is not there.")] = WORLD,
    stand_in: Annotated[
        Path | None, typer.Option(help="A program with vLLM's interface in its place.")
    ] = None,
) -> None:
    """Measure, and compare with the goals."""
    made = the_world(world)
    question = chats(made)[0].text
    with gateway(made, [*SMALL, LARGE], stand_in) as running:
        asyncio.run(watch(running, question, lambda: False, seconds=5))  # until everything is warm
        before = running.resident_bytes()
        quiet = asyncio.run(watch(running, question, lambda: False, seconds=alone))
        found = multiprocessing.get_context("spawn").Queue()
        sender = multiprocessing.get_context("spawn").Process(
            target=send_large, args=(running.url, requests, at_once, largest, found)
        )
        sender.start()
        busy = asyncio.run(watch(running, question, sender.is_alive, seconds=1))
        statuses: dict[str, int] = found.get(timeout=60)
        sender.join()
        time.sleep(SETTLE_SECONDS)
        after = running.resident_bytes()
        restarts = sum(model["restarts"] for model in asyncio.run(running.ready()).values())
    results = {
        "statuses": statuses,
        "restarts": restarts,
        "small_requests": {"alone": len(quiet["small"]), "beside": len(busy["small"])},
        "failed": quiet["failed"] + busy["failed"],
        "p99_alone": percentile(quiet["small"], 0.99),
        "p99_beside": percentile(busy["small"], 0.99),
        "p99_ratio": percentile(busy["small"], 0.99) / percentile(quiet["small"], 0.99),
        "health_max_alone": max(quiet["health"]),
        "health_max_beside": max(busy["health"]),
        "memory_before": before,
        "memory_ratio": after / before,
    }
    goals = {
        "p99": results["p99_ratio"] <= P99_GOAL,
        "health": results["health_max_beside"] <= HEALTH_GOAL,
        "memory": results["memory_ratio"] <= MEMORY_GOAL,
        "nothing failed": not results["failed"] and not restarts,
    }
    print_table(results)
    print(json.dumps({"benchmark": "long_prompts", "goals_met": goals, "results": results}))
    if not goals["nothing failed"]:
        raise typer.Exit(1)


async def watch(
    running: Gateway, question: str, goes_on: Callable[[], bool], seconds: float
) -> dict[str, Any]:
    """Ask the small models and `/health` for at least so long, and while `goes_on`."""
    seen: dict[str, Any] = {"small": [], "health": [], "failed": 0}
    end = time.monotonic() + seconds

    def ended() -> bool:
        return time.monotonic() > end and not goes_on()

    async with running.session(timeout=aiohttp.ClientTimeout(total=300)) as session:
        asking = (ask_small(session, model, question, seen, ended) for model in SMALL)
        await asyncio.gather(*asking, ask_health(session, seen, ended))
    return seen


async def ask_small(
    session: aiohttp.ClientSession, model: str, question: str, seen: dict[str, Any], ended: Callable[[], bool]
) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 4,
        "control": CONTROL,
    }
    while not ended():
        began = time.perf_counter()
        async with session.post(CHAT, json=body) as response:
            await response.read()
        seen["small"].append(time.perf_counter() - began)
        seen["failed"] += response.status != 200
        await asyncio.sleep(PAUSE_SECONDS)


async def ask_health(session: aiohttp.ClientSession, seen: dict[str, Any], ended: Callable[[], bool]) -> None:
    while not ended():
        began = time.perf_counter()
        async with session.get("/health") as response:
            await response.read()
        seen["health"].append(time.perf_counter() - began)
        await asyncio.sleep(HEALTH_SECONDS)


def send_large(url: str, requests: int, at_once: int, largest: float, found: Any) -> None:
    """Send the large requests; what became of them goes into the queue `found`."""
    os.nice(19)  # such clients are on other machines: making the bodies must not take the engines' cores
    found.put(asyncio.run(_send_large(url, requests, at_once, largest)))


async def _send_large(url: str, requests: int, at_once: int, largest: float) -> dict[str, int]:
    rng = random.Random(0)
    kinds = itertools.cycle(KINDS.items())
    statuses: Counter[str] = Counter()
    places = asyncio.Semaphore(at_once)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)

    async def send(kind: str, case: Case) -> None:
        path, body = case
        try:
            headers = {"content-type": "application/json"}
            async with session.post(path, data=io.BytesIO(body), headers=headers) as response:
                await response.read()
                statuses[f"{kind}: {response.status}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            statuses[f"{kind}: {type(error).__name__}"] += 1
        finally:
            places.release()

    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        tasks = []
        for _ in range(requests):
            await places.acquire()
            kind, make = next(kinds)
            case = make(int(rng.uniform(1, largest) * 1e6))
            tasks.append(asyncio.create_task(send(kind, case)))
        await asyncio.gather(*tasks)
    return dict(sorted(statuses.items()))


def _chat(content: str, **more: Any) -> Case:
    return CHAT, _messages(f'{{"role": "user", "content": {content}}}', **more)


def _messages(turns: str, **more: Any) -> bytes:
    settings = {"model": LARGE, "max_tokens": 4, "control": CONTROL, **more}
    return (json.dumps(settings)[:-1] + ', "messages": [' + turns + "]}").encode()


def _text(size: int) -> str:
    return json.dumps("a long story, " * (size // 14))


KINDS: dict[str, Callable[[int], Case]] = {
    "text": lambda size: _chat(_text(size)),
    "other script": lambda size: _chat('"' + "एक कहानी " * (size // 25) + '"'),
    "one word": lambda size: _chat('"' + "x" * size + '"'),
    "messages": lambda size: (CHAT, _messages(",".join(['{"role": "user", "content": "a"}'] * (size // 33)))),
    "lists": lambda size: (CHAT, _messages(",".join(["[]"] * (size // 3)))),
    "image": lambda size: _chat(
        '[{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,'
        + "A" * size
        + '"}}]'
    ),
    "short enough": lambda _: _chat(_text(SHORT_ENOUGH)),
    "no control": lambda size: (
        COMPLETIONS,
        json.dumps(
            {"model": LARGE, "max_tokens": 4, "control": False, "prompt": "word " * (size // 5)}
        ).encode(),
    ),
}
"""Bodies of about so many bytes."""


def print_table(results: dict[str, Any]) -> None:
    table = Table("", "alone", "beside large requests", "goal")
    rows = (
        ("small requests, p99 in s", "p99_alone", "p99_beside", f"{P99_GOAL:g} times"),
        ("/health, longest in s", "health_max_alone", "health_max_beside", f"{HEALTH_GOAL:g} s"),
    )
    for name, alone, beside, goal in rows:
        table.add_row(name, f"{results[alone]:.3f}", f"{results[beside]:.3f}", goal)
    memory = f"{results['memory_before'] / 2**20:.0f} MiB"
    table.add_row(
        "memory of all processes", memory, f"{results['memory_ratio']:.3f} times", f"{MEMORY_GOAL:g} times"
    )
    console = Console()
    console.print(table)
    for status, count in results["statuses"].items():
        console.print(f"  {count} {status}")


if __name__ == "__main__":
    typer.run(main)
