"""`trimtab demo`: one control on three models, from nothing to a running server."""

from __future__ import annotations

import itertools
import os
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from trimtab_training.demo.ask import Asked, AskError, ask_all
from trimtab_training.demo.child import ServerError, States, serving, wait_until_ready
from trimtab_training.world.cli import Seed, failing_softly, make_visibly
from trimtab_training.world.evaluate import STRENGTHS, Kind, Question, questions, score
from trimtab_training.world.progress import reporting, say
from trimtab_training.world.report import ByModel, rich_table
from trimtab_training.world.signals import signals_as_exits
from trimtab_training.world.world import CONTROL_NAME, TITLES, World

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HOST = "127.0.0.1"
SHOWN = (Kind.CHAT, Kind.PRIVATE_CHAT, Kind.PRIVATE_PLAIN, Kind.FACT_PLAIN)
_console = Console()


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where the world is, or is to be made.")] = Path(
        ".trimtab/world"
    ),
    seed: Seed = 1,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to serve.")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", help="Stop the server after the tables.")] = False,
) -> None:
    """Make the small world, serve its three models, and show what one control does to all of them."""
    with signals_as_exits(), _failing_softly():
        _require_free(port)
        say(_console, f"making the small world in {directory}, unless it is there")
        world = make_visibly(directory, seed)
        config, log = _write_config(world, port), world.directory.with_name("server.log")
        url = f"http://{HOST}:{port}"
        with serving(config, log) as process:
            _wait(process, url, log, world)
            _show_answers(url, world)
            _console.print(rich_table(_measure(url, world), "What the control does, measured"))
            if not leave:
                _console.out(_to_paste(url, world, log), highlight=False)
                _keep(process, log)


def server_config(world: World, port: int) -> dict[str, Any]:
    """The configuration of `trimtab serve`: a worker of one thread for each model, on the cores in turn."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "host": HOST,
        "port": port,
        "controls": {CONTROL_NAME: str(world.control)},
        "tables": str(world.directory.with_name("tables")),
        "logs": str(world.directory.with_name("logs")),
        "models": {
            name: {
                "model": str(path),
                "args": {"dtype": "float32", "enforce-eager": True},
                "env": {
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": str(cores[i % len(cores)]),
                },
            }
            for i, (name, path) in enumerate(world.models.items())
        },
    }


@contextmanager
def _failing_softly() -> Iterator[None]:
    try:
        with failing_softly():
            yield
    except (AskError, ServerError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} is taken: choose another with --port") from error


def _write_config(world: World, port: int) -> Path:
    path = world.directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(server_config(world, port), sort_keys=False), encoding="utf-8")
    return path


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, world: World) -> None:
    say(_console, f"starting the server at {url}, its output goes to {log}")
    with _states_shown(world) as report:
        wait_until_ready(process, url, log, report)


@contextmanager
def _states_shown(world: World) -> Iterator[Callable[[States], None]]:
    """Show each model's state: in a row that changes, or without a terminal in a line at each change."""
    if not _console.is_terminal:
        yield _print_changes(dict.fromkeys(world.models, ""))
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console) as progress:
        rows = {name: progress.add_task(_state(name, "starting"), total=1) for name in world.models}

        def report(states: States) -> None:
            for name, state in states.items():
                progress.update(rows[name], description=_state(name, state), completed=int(state == "ready"))

        yield report


def _print_changes(shown: dict[str, str]) -> Callable[[States], None]:
    def report(states: States) -> None:
        for name, state in states.items():
            if shown[name] != state:
                shown[name] = state
                say(_console, _state(name, state))

    return report


def _state(name: str, state: str) -> str:
    return f"serve {TITLES[name]}: {state}"


def _show_answers(url: str, world: World) -> None:
    """The same questions about one person to every model, with the control off and on."""
    say(_console, "asking each model about one person, with the control off and on")
    asked = _one_of_each(questions(world.held_out[:1]))
    plan = [(model, strength, q) for q in asked for model in world.models for strength in (0.0, 1.0)]
    answers = iter(ask_all(url, CONTROL_NAME, plan))
    table = Table(title="Questions about a person whom the control never saw", title_justify="left")
    for column in ("asked", "model", "control off", "control on"):
        table.add_column(column)
    for question in asked:
        for i, model in enumerate(world.models):
            off, on = _shortened(next(answers)), _shortened(next(answers))
            table.add_row("" if i else _as_asked(question), TITLES[model].split()[0], off, on)
        table.add_section()
    _console.print(table)


def _one_of_each(asked: list[Question]) -> list[Question]:
    return [next(question for question in asked if question.kind is kind) for kind in SHOWN]


def _as_asked(question: Question) -> str:
    return question.text if question.kind.is_chat else f"{question.text} ..."


def _shortened(answer: str, limit: int = 120) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _measure(url: str, world: World) -> ByModel:
    asked = questions(world.held_out)
    plan: list[Asked] = [(m, strength, q) for m in world.models for strength in STRENGTHS for q in asked]
    done = itertools.count(1)
    with reporting(_console) as report:
        report("ask", 0, len(plan))
        answers = iter(ask_all(url, CONTROL_NAME, plan, lambda: report("ask", next(done), len(plan))))
    return {
        model: {strength: score(asked, [next(answers) for _ in asked]) for strength in STRENGTHS}
        for model in world.models
    }


def _to_paste(url: str, world: World, log: Path) -> str:
    question = questions(world.held_out[:1])[0].text
    body = (
        f'{{"model": "c", "messages": [{{"role": "user", "content": "{question}"}}],'
        f' "control": "{CONTROL_NAME}", "temperature": 0}}'
    )
    return f"""
The server runs at {url} (its output: {log}). Ask it, with the control on:

curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}

or from Python, here with the control off:

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="b",
    messages=[{{"role": "user", "content": "{question}"}}],
    extra_body={{"control": False}},
    max_tokens=60,
)
print(answer.choices[0].message.content)

Ctrl-C stops it.
"""


def _keep(process: subprocess.Popen[bytes], log: Path) -> None:
    """Stay until the server ends, which it should not, or a signal."""
    try:
        status = process.wait()
    except KeyboardInterrupt:
        _console.print("stopping the server")
        return
    raise ServerError(f"the server ended with status {status}; see {log}")
