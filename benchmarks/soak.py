"""Does anybody get a wrong answer? Streams for minutes, while controls come and go and a worker is killed.

Many clients ask two models of the small world at once, plain, under a control, under one that is loaded
and unloaded all the while, and under both. Each stream is held to what the same request said before, when it
was alone. The second model's worker is killed again and again: only its requests may fail, and with an error
that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.table import Table

from gateways import CONTROL, LATE, WORLD, Gateway, chats, gateway, percentile, the_world
from trimtab_training.world.evaluate import Question

SPARED, KILLED = "a", "b"
WAYS: tuple[Any, ...] = (
    False,
    {"name": CONTROL, "strength": 1.0},
    {"name": LATE, "strength": 1.0},
    [{"name": CONTROL, "strength": 0.5}, {"name": LATE, "strength": 0.5}],
)
"""What a request may say of control."""
CHANGE_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """One request, and what it is to say."""

    model: str
    question: Question
    control: Any
    text: str = ""

    @property
    def needs_late(self) -> bool:
        return LATE in json.dumps(self.control)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.question.text}],
            "max_tokens": self.question.max_tokens,
            "temperature": 0,
            "control": self.control,
            "stream": True,
        }


@dataclass
class Seen:
    """What became of the requests."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By model: right, wrong, gone (its control was being unloaded), failed."""
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    changes: int = 0
    kills: int = 0

    def add(self, case: Case, outcome: str, what: str = "") -> None:
        self.outcomes[case.model, outcome] += 1
        if outcome == "wrong" or (outcome == "failed" and case.model == SPARED):
            self.faults.append(f"{case.model} {case.control}: {what[:300]}")

    def count(self, outcome: str, model: str | None = None) -> int:
        return sum(n for (of, how), n in self.outcomes.items() if how == outcome and model in (None, of))


@dataclass
class Late:
    """Whether the control that comes and goes is there."""

    is_there: bool = False


def main(
    minutes: Annotated[float, typer.Option(min=0.05)] = 10,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 64,
    kill_every: Annotated[float, typer.Option(min=1, help="Seconds between two kills.")] = 120,
    people: Annotated[int, typer.Option(min=1, help="Questions that are asked.")] = 20,
    *,
    world: Annotated[Path, typer.Option(help="The small world; made where it is not there.")] = WORLD,
    stand_in: Annotated[
        Path | None, typer.Option(help="A program with vLLM's interface in its place.")
    ] = None,
) -> None:
    """Ask, and hold every answer to what it should be."""
    made = the_world(world)
    with gateway(made, [SPARED, KILLED], stand_in, {"restarts": {"attempts": 100, "longest": 5}}) as running:
        asked = chats(made)[:people]
        cases = asyncio.run(expected(running, asked))
        seen = asyncio.run(soak(running, cases, minutes * 60, streams, kill_every))
        restarts = asyncio.run(running.ready())[KILLED]["restarts"]
    print_table(seen)
    result = {
        "requests": sum(seen.outcomes.values()),
        **{how: {model: seen.count(how, model) for model in (SPARED, KILLED)} for how in OUTCOMES},
        "changes": seen.changes,
        "kills": seen.kills,
        "restarts": restarts,
        "seconds_p50": percentile(seen.seconds, 0.5),
        "seconds_p99": percentile(seen.seconds, 0.99),
    }
    for fault in seen.faults[:20]:
        typer.echo(fault, err=True)
    print(json.dumps({"benchmark": "soak", "minutes": minutes, "streams": streams, "results": result}))
    if seen.faults:
        raise typer.Exit(1)


OUTCOMES = ("right", "wrong", "gone", "failed")


async def expected(running: Gateway, asked: list[Question]) -> list[Case]:
    """What each request says when it is alone."""
    cases = []
    async with running.session() as session:
        await running.change(session, "load")
        for model in (SPARED, KILLED):
            for question in asked:
                for control in WAYS:
                    case = Case(model, question, control)
                    outcome, text = await stream_of(session, case)
                    if outcome != "whole":
                        raise RuntimeError(f"{case} failed while nothing else ran: {text}")
                    cases.append(Case(model, question, control, text))
        await running.change(session, "unload")
    return cases


async def soak(running: Gateway, cases: list[Case], seconds: float, streams: int, kill_every: float) -> Seen:
    """Everything at once, for so many seconds."""
    seen, late = Seen(), Late()
    end = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=120)
    async with running.session(timeout=timeout) as session:
        disturbing = [
            asyncio.create_task(come_and_go(running, session, late, seen)),
            asyncio.create_task(kill(running, kill_every, seen)),
        ]
        asking = (ask(session, drawn(cases, i), late, seen, end) for i in range(streams))
        try:
            await asyncio.gather(*asking)
        finally:
            for task in disturbing:
                task.cancel()
            await asyncio.gather(*disturbing, return_exceptions=True)
    return seen


def drawn(cases: list[Case], seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        yield rng.choice(cases)


async def ask(
    session: aiohttp.ClientSession, cases: Iterator[Case], late: Late, seen: Seen, end: float
) -> None:
    """Send one of `cases` after the other until `end`."""
    while time.monotonic() < end:
        case = next(cases)
        if case.needs_late and not late.is_there:
            await asyncio.sleep(0)
            continue
        started = time.monotonic()
        outcome, text = await stream_of(session, case)
        if outcome == "whole":
            seen.seconds.append(time.monotonic() - started)
            seen.add(case, "right" if text == case.text else "wrong", f"{text!r} in place of {case.text!r}")
        elif case.needs_late and "control_not_found" in text:
            seen.add(case, "gone")
        else:
            seen.add(case, "failed", text)
            await asyncio.sleep(0.2)


async def stream_of(session: aiohttp.ClientSession, case: Case) -> tuple[str, str]:
    """`whole` and the text of the answer; else `failed` and why."""
    text, ended = "", False
    try:
        async with session.post("/v1/chat/completions", json=case.body) as response:
            if response.status != 200:
                return "failed", f"{response.status} {await response.text()}"
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        return "failed", json.dumps(event)
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (aiohttp.ClientError, TimeoutError) as error:
        return "failed", repr(error)
    return ("whole", text) if ended else ("failed", f"it ended in the middle: {text}")


async def come_and_go(running: Gateway, session: aiohttp.ClientSession, late: Late, seen: Seen) -> None:
    """Load and unload a control, again and again."""
    while True:
        for what in ("load", "unload"):
            late.is_there = False
            status, text = await running.change(session, what)
            if status == 200:
                seen.changes += 1
                late.is_there = what == "load"
            elif f"{KILLED}:" not in text and "worker" not in text:
                seen.faults.append(f"{what}: {status} {text[:300]}")
            await asyncio.sleep(CHANGE_SECONDS)


async def kill(running: Gateway, every: float, seen: Seen) -> None:
    """Kill one worker, again and again."""
    while True:
        await asyncio.sleep(every)
        with contextlib.suppress(LookupError, ProcessLookupError):
            os.kill(running.worker(KILLED), signal.SIGKILL)
            seen.kills += 1


def print_table(seen: Seen) -> None:
    table = Table("model", *OUTCOMES, title="Streams, by what became of them")
    for model in (SPARED, KILLED):
        table.add_row(model, *(f"{seen.count(outcome, model):,}" for outcome in OUTCOMES))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
