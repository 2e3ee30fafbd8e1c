"""What control costs, as ratios between things that were measured within seconds of each other.

Three stock vLLM servers, each with its engine on the first core, serve a target with random weights (322 M
parameters, Llama shape, 32,000 tokens): without the plugin, with the control's forward before the target's
(in series), and beside it on the last core. They are driven one after the other, round by round; the first
round only warms up. Medians over rounds, lowest to highest. Where there are only two cores, the one beside is
not free: vLLM's API server, its polling EngineCore process and the client are there too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from measurements import (
    AGAINST_REFERENCE,
    BESIDE,
    LONG_PROMPT,
    PROMPT,
    SERIES,
    WITHOUT,
    Bench,
    Found,
    make_forwards,
    make_references,
)
from models import CONTROLS, Models, make_models, token_bytes
from serving import Cores, Load, Server, counter, resident_bytes, servers
from summaries import print_tables, summarise
from trimtab_processors.cache import BLOCK_SIZE, blocks_for
from trimtab_processors.pack import DEFAULT_ROUTING
from trimtab_processors.settings import DEFAULT_CACHE_BYTES

WARM_UP_TOKENS = 4


def main(
    *,
    batch: Annotated[list[int], typer.Option(min=1, help="Requests at once; may be repeated.")] = [1, 8, 32],
    control: Annotated[list[str], typer.Option(help="A shape and a tokenizer; may be repeated.")] = list(
        CONTROLS
    ),
    routing: Annotated[str, typer.Option(help="How shifts reach the target's tokens.")] = DEFAULT_ROUTING,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request generates.")] = 24,
    save: Annotated[Path | None, typer.Option(help="A file for the JSON too.")] = None,
) -> None:
    """Measure what control costs."""
    if unknown := set(control) - set(CONTROLS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the controls are {', '.join(CONTROLS)}")
    torch.set_num_threads(1)
    cores = Cores.of_this_machine()
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        models = make_models(directory, control)
        largest = Load(max(*batch, *AGAINST_REFERENCE), PROMPT, tokens, 0)
        told = plugins(directory, models, cores, routing)
        with servers(directory, models, told, largest, cores) as running:
            os.sched_setaffinity(0, cores.others)  # not before: the servers would inherit it
            forwards = make_forwards(models, cores.engine, PROMPT + tokens // 2)
            bench = Bench(running, control, cores, forwards, make_references(models))
            run_round(bench, batch, WARM_UP_TOKENS, 0, Found())
            for seed in range(1, rounds + 1):
                run_round(bench, batch, tokens, seed, found)
            realigned = {name: realigned_share(running[SERIES], name) for name in control}
            memory = memory_of(running, models, PROMPT + tokens)
    results = summarise(found, realigned) | {"memory": memory}
    print_tables(results)
    settings = {"routing": routing, "rounds": rounds, "tokens": tokens, "cores": os.cpu_count()}
    line = json.dumps({"benchmark": "control", **settings, "results": results})
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(line + "\n", encoding="utf-8")
    print(line)


def plugins(directory: Path, models: Models, cores: Cores, routing: str) -> dict[str, dict[str, Any] | None]:
    """What the plugin of each server is told."""
    controls = {name: str(path) for name, path in models.controls.items()}
    told = {"controls": controls, "tables": str(directory / "tables"), "routing": routing}
    return {
        WITHOUT: None,
        SERIES: told | {"control_cpus": []},
        BESIDE: told | {"control_cpus": [cores.control]},
    }


def run_round(bench: Bench, batches: Sequence[int], tokens: int, seed: int, found: Found) -> None:
    """Measure everything once."""
    for size in batches:
        decoded, off = bench.decode(Load(size, PROMPT, tokens, seed))
        found.decode += decoded
        found.off += off
    loads = [Load(size, PROMPT, tokens, seed) for size in AGAINST_REFERENCE]
    found.against += bench.against(loads)
    found.first_tokens += bench.first_tokens(Load(1, LONG_PROMPT, 2, seed))


def realigned_share(server: Server, control: str) -> float:
    """The share of the tokens under `control` after which the server tokenized text anew."""
    metrics = server.metrics()
    tokens = counter(metrics, "trimtab_controlled_tokens", control)
    return counter(metrics, "trimtab_realignments", control) / max(tokens, 1)


def memory_of(running: dict[str, Server], models: Models, context: int) -> dict[str, Any]:
    """Bytes that the controls take in an engine, and each of them for a request of `context` tokens."""
    resident = {name: resident_bytes(server.worker()) for name, server in running.items()}
    return {
        "engine_without": resident[WITHOUT],
        "engine_more": {name: resident[name] - resident[WITHOUT] for name in (SERIES, BESIDE)},
        "controls": {
            name: {
                "weights": (path / "model.safetensors").stat().st_size,
                "pool": DEFAULT_CACHE_BYTES,
                "token": token_bytes(name.partition("-")[0]),
                "request_tokens": context,
                "request_blocks": blocks_for(context),
                "block_tokens": BLOCK_SIZE,
            }
            for name, path in models.controls.items()
        },
    }


if __name__ == "__main__":
    typer.run(main)
