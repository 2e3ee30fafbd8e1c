"""Can a client break anything? Thousands of requests, most of them wrong in what they say of control.

Nothing may answer with a 5xx; every error is an error object with its four fields; no worker ends; and the
memory of the gateway and of its workers does not grow after the first fifth of the requests.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.table import Table

from gateways import CONTROL, WORLD, Gateway, gateway, the_world

AT_ONCE = 8
MODEL = "a"
GROWTH_GOAL = 0.02
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
TEXTS = (
    *("", " ", "off", "on", "true", "null", CONTROL, CONTROL.upper(), f"{CONTROL}=1", f"{CONTROL}=", "=1"),
    *(f"{CONTROL}=nan", f"{CONTROL}=1e999", f"{CONTROL}=-11", f"{CONTROL};top_k=0", f"{CONTROL};top_k=9" * 2),
    *(
        f"{CONTROL},{CONTROL}",
        "nobody",
        "../" * 9,
        "a" * 5000,
        "\u00e9\u4e2d\U0001f600",
        "\x7f",
        "%00",
        "a:b:c",
    ),
    *("trimtab_control", "$(id)", "{{7*7}}", "'; --", "\\u0000", "a\tb", "0" * 400),
)
NUMBERS = (0, 1, -1, 0.5, -10, 10, 10.5, 1e300, -1e-300, 2**63, 10**40, True, False)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", '"\\ud800"', '"a\\udfffb"', "[" * 600 + "]" * 600)
"""JSON that Python would not write."""


@dataclass(frozen=True)
class Shot:
    """One request."""

    path: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Seen:
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes, after the first fifth of the requests and after each further one."""


def main(
    requests: Annotated[int, typer.Option(min=10)] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same requests.")] = 0,
    world: Annotated[Path, typer.Option(help="The small world; made where it is not there.")] = WORLD,
    stand_in: Annotated[
        Path | None, typer.Option(help="A program with vLLM's interface in its place.")
    ] = None,
) -> None:
    """Fire, and look at what is left."""
    started = time.monotonic()
    with gateway(the_world(world), [MODEL], stand_in, {"log_level": "warning"}) as running:
        seen = asyncio.run(fire(running, requests, random.Random(seed)))
        restarts = asyncio.run(running.ready())[MODEL]["restarts"]
        log = running.log.read_text(errors="replace")
    growth = seen.memory[-1] / seen.memory[0] - 1
    if restarts:
        seen.faults.append(f"the worker was started again {restarts} times")
    if "Traceback" in log:
        seen.faults.append(f"the gateway's log has a traceback:\n{log[log.index('Traceback') :][:1500]}")
    if growth > GROWTH_GOAL:
        seen.faults.append(f"memory has grown by {growth:.1%}")
    table = Table("status", "requests", title=f"{requests:,} requests, memory {growth:+.2%}")
    for status, count in sorted(seen.statuses.items()):
        table.add_row(str(status), f"{count:,}")
    Console().print(table)
    for fault in seen.faults[:20]:
        typer.echo(fault, err=True)
    result = {
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "memory_growth": growth,
        "memory": seen.memory,
        "restarts": restarts,
        "faults": len(seen.faults),
        "seconds": time.monotonic() - started,
    }
    print(json.dumps({"benchmark": "fuzz", "requests": requests, "seed": seed, "results": result}))
    if seen.faults:
        raise typer.Exit(1)


async def fire(running: Gateway, count: int, rng: random.Random) -> Seen:
    seen = Seen()
    async with running.session(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for fifth in range(5):
            shots = [draw(rng) for _ in range(count // 5)]
            queue = iter(shots)

            async def worker(queue: Any = queue) -> None:
                for shot in queue:
                    await fire_one(session, shot, seen)

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
            seen.memory.append(running.resident_bytes())
            Console(stderr=True).print(f"{fifth + 1} of 5", highlight=False)
    return seen


async def fire_one(session: aiohttp.ClientSession, shot: Shot, seen: Seen) -> None:
    told = f"{shot.path} {shot.body[:400]!r} {str(shot.headers)[:200]}"
    try:
        async with session.post(shot.path, data=shot.body, headers=shot.headers) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.faults.append(f"{error!r} after {told}")
        return
    seen.statuses[response.status] += 1
    if response.status >= 500:
        seen.faults.append(f"{response.status} {body[:300]!r} after {told}")
    elif response.status >= 400 and not is_error_object(body):
        seen.faults.append(f"{response.status} without an error object: {body[:300]!r} after {told}")


def is_error_object(body: bytes) -> bool:
    """As OpenAI's, or for `/v1/messages` as Anthropic's."""
    try:
        error = json.loads(body)["error"]
        return {"message", "type"} <= set(error) and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        return False


def draw(rng: random.Random) -> Shot:
    """A request that may say anything of control, in one or several ways."""
    path = rng.choice(PATHS)
    fields: dict[str, str] = {"model": json.dumps(alias(rng)), "max_tokens": "1", "max_output_tokens": "1"}
    fields |= {"messages": said(rng), "prompt": '"hi"', "input": '"hi"'}
    if rng.random() < 0.8:
        fields["control"] = control(rng)
    if rng.random() < 0.1:
        fields["vllm_xargs"] = written(value(rng, 2), rng)
    if rng.random() < 0.1:
        fields[rng.choice(("temperature", "n", "stream", "logprobs", "stop"))] = written(value(rng, 1), rng)
    text = "{" + ", ".join(f'"{key}": {given}' for key, given in fields.items()) + "}"
    headers = {"content-type": "application/json"}
    if rng.random() < 0.3:
        words = rng.choice(TEXTS).replace("\t", " ")
        headers["x-trimtab-control"] = "".join(c for c in words if c.isprintable())[:4000]
    return Shot(path, text.encode(errors="surrogatepass"), headers)


def alias(rng: random.Random) -> Any:
    draw = rng.random()
    if draw < 0.6:
        return MODEL
    if draw < 0.9:
        return f"{MODEL}:{rng.choice(TEXTS)}"
    return value(rng, 1)


def control(rng: random.Random) -> str:
    """Near what is right, or far from it."""
    if rng.random() < 0.1:
        return rng.choice(RAW)
    if rng.random() < 0.5:
        near = {
            "name": rng.choice((CONTROL, CONTROL, rng.choice(TEXTS))),
            "strength": rng.choice(NUMBERS),
            "top_k": rng.choice((1, 50, 1024, 0, None, 2.5)),
            rng.choice(TEXTS): value(rng, 1),
        }
        kept = {key: near[key] for key in near if rng.random() < 0.7}
        return written(rng.choice(([kept], kept, [kept, CONTROL])), rng)
    return written(value(rng, 3), rng)


def said(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return json.dumps([{"role": "user", "content": rng.choice(TEXTS)}])
    return written(value(rng, 2), rng)


def value(rng: random.Random, depth: int) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(NUMBERS),
        lambda: None,
        lambda: [value(rng, depth - 1) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(TEXTS): value(rng, depth - 1) for _ in range(rng.randrange(4))},
    ]
    return rng.choice(kinds if depth > 0 else kinds[:3])()


def written(given: Any, rng: random.Random) -> str:
    """As JSON, now and then with something in it that Python would not write."""
    text = json.dumps(given)
    return text.replace("null", rng.choice(RAW), 1) if rng.random() < 0.2 else text


if __name__ == "__main__":
    typer.run(main)
