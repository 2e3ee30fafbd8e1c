"""Can a client break anything? Thousands of requests, most of them wrong in what they say of control.

Nothing may answer with a 5xx; every error is an error object with its four fields; no worker ends; and the
memory of the gateway and of its workers does not grow after the first fifth of the requests. Then
Schemathesis asks what the OpenAPI document allows and forbids.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import aiohttp
import typer
from rich.console import Console
from rich.table import Table
from yarl import URL

from gateways import ADMIN_KEY, CONTROL, WORLD, Gateway, gateway, the_world

AT_ONCE = 8
MODEL = "a"
GROWTH_GOAL = 0.02
MESSAGES = "/v1/messages"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", MESSAGES)
ERROR_FIELDS = {"message", "type", "param", "code"}
SCHEMATHESIS = Path(".venv-clients/bin/schemathesis").absolute()
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
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
RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, '"\\ud800"', '"a\\udfffb"'),
    *("[" * 600 + "]" * 600, "[" * 50_000 + "]" * 50_000, '{"name":' * 3000 + "1" + "}" * 3000),
    *('{"\\ud800": 1}', '{"name": "a", "\\udc00": {"\\ud800": []}}', '{"name": "a", "name": "b"}'),
)
"""JSON that Python would not write."""


@dataclass(frozen=True)
class Shot:
    """One request."""

    path: str
    body: bytes
    header: bytes | None = None
    """What it says in `X-Trimtab-Control`."""

    def __str__(self) -> str:
        return f"{self.path[:200]} {self.body[:400]!r} {(self.header or b'-')[:200]!r}"


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
    examples: Annotated[
        int, typer.Option(min=0, help="Of Schemathesis, for each endpoint; 0: without.")
    ] = 30,
) -> None:
    """Fire, and look at what is left."""
    started = time.monotonic()
    with gateway(the_world(world), [MODEL], stand_in, {"log_level": "warning"}) as running:
        seen = asyncio.run(fire(running, requests, random.Random(seed)))
        documented = schemathesis(running, examples, seed, seen) if examples else None
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
        "schemathesis": documented,
        "faults": len(seen.faults),
        "seconds": time.monotonic() - started,
    }
    print(json.dumps({"benchmark": "fuzz", "requests": requests, "seed": seed, "results": result}))
    if seen.faults:
        raise typer.Exit(1)


async def fire(running: Gateway, count: int, rng: random.Random) -> Seen:
    seen = Seen()
    parts = urlsplit(running.url)
    address = (parts.hostname or "", parts.port or 0)
    async with running.session(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for fifth in range(5):
            shots = [draw(rng) for _ in range(count // 5)]
            queue = iter(shots)

            async def worker(queue: Any = queue) -> None:
                for shot in queue:
                    await fire_one(session, address, shot, seen)

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
            seen.memory.append(running.resident_bytes())
            Console(stderr=True).print(f"{fifth + 1} of 5", highlight=False)
    return seen


async def fire_one(session: aiohttp.ClientSession, address: tuple[str, int], shot: Shot, seen: Seen) -> None:
    try:
        status, body = await (sent(session, shot) if shot.header is None else sent_by_hand(address, shot))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        seen.faults.append(f"{error!r} after {shot}")
        return
    seen.statuses[status] += 1
    if status >= 500:
        seen.faults.append(f"{status} {body[:300]!r} after {shot}")
    elif status >= 400 and not is_error_object(shot.path, body):
        seen.faults.append(f"{status} without an error object: {body[:300]!r} after {shot}")


async def sent(session: aiohttp.ClientSession, shot: Shot) -> tuple[int, bytes]:
    """Status and body of the answer."""
    options: dict[str, Any] = {"data": shot.body, "headers": {"content-type": "application/json"}}
    if not shot.body:
        options = {}
    method = session.post if shot.body else session.get
    async with method(URL(shot.path, encoded=True), **options) as response:
        return response.status, await response.read()


async def sent_by_hand(address: tuple[str, int], shot: Shot) -> tuple[int, bytes]:
    """The same for a request whose header has bytes that no client library would send."""
    head = f"POST {shot.path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    length = f"\r\nContent-Length: {len(shot.body)}\r\n\r\n"
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*address)
        control = b"X-Trimtab-Control: " + (shot.header or b"")
        writer.write(head.encode() + control + length.encode() + shot.body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    start, _, body = answer.partition(b"\r\n\r\n")
    return int(start.split(b" ", 2)[1]), body


def is_error_object(path: str, body: bytes) -> bool:
    """As OpenAI's; what vLLM itself refuses at `/v1/messages` is as Anthropic's."""
    try:
        error = json.loads(body)["error"]
        fields = set(error)
        return bool(error["message"]) and (
            fields == ERROR_FIELDS or (path == MESSAGES and fields == {"message", "type"})
        )
    except (ValueError, KeyError, TypeError):
        return False


def schemathesis(running: Gateway, examples: int, seed: int, seen: Seen) -> dict[str, int] | None:
    """Hold the gateway to its document; how many requests were generated, and how many were found faulty."""
    if not SCHEMATHESIS.exists():
        typer.echo(f"{SCHEMATHESIS} is not there: without Schemathesis", err=True)
        return None
    command = [
        *(str(SCHEMATHESIS), "run", f"{running.url}/openapi.json", "--checks", CHECKS, "--workers", "1"),
        *("--max-examples", str(examples), "--seed", str(seed), "--phases", "examples,fuzzing"),
        *("-H", f"Authorization: Bearer {ADMIN_KEY}", "--suppress-health-check", "all"),
        *("--exclude-path", "/metrics", "--no-color"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=directory)
    counts = re.search(r"(\d[\d,]*) generated(?:, (\d+) found (\d+) unique failures?)?", done.stdout)
    if done.returncode:
        seen.faults.append(f"Schemathesis:\n{done.stdout[-3000:]}{done.stderr[-500:]}")
    generated = int(counts[1].replace(",", "")) if counts else 0
    return {"requests": generated, "failures": int(counts[2] or 0) if counts else 0}


def draw(rng: random.Random) -> Shot:
    """A request that may say anything of control, in one or several ways."""
    if rng.random() < 0.03:
        return Shot(f"/v1/models/{quote(str(alias(rng)), safe='')[:4000]}", b"")
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
    return Shot(path, text.encode(errors="surrogatepass"), header(rng) if rng.random() < 0.3 else None)


def header(rng: random.Random) -> bytes:
    """Something like a control, with or without bytes that are neither ASCII nor UTF-8."""
    words = rng.choice(TEXTS).encode()[:4000]
    strange = bytes(rng.randrange(0x80, 0x100) for _ in range(rng.randrange(8)))
    where = rng.randrange(len(words) + 1)
    written = words[:where] + strange + words[where:] if rng.random() < 0.5 else words
    return bytes(byte for byte in written if byte >= 0x20 and byte != 0x7F)  # what HTTP allows


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
