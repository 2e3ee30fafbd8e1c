"""The time that each routing adds behind the target's logits, where nothing hides it: its part of `apply`.

Targets have so many of tekken's tokens and, past its 131,072, these with an ending; the control has those of
Mistral v1. Rows are random, so that each request expands a node of the trie at random; `largest` expands for
every request the one that most tokens pass; with `pieces`, every request has a spelling pending. On one
thread, or on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trimtab_mappings import ByteEncoder, MappingTable, build_table, load_encoder
from trimtab_processors.routing.base import Pair, Routing
from trimtab_processors.routing.pieces import PendingSpelling
from trimtab_processors.routing.registry import ROUTINGS
from vocabularies import real


def main(
    width: Annotated[list[int], typer.Option(min=1, help="Columns of the logits; may be repeated.")] = [
        *(32_000, 128_000, 200_000)
    ],
    batch: Annotated[list[int], typer.Option(min=1, help="Requests at once; may be repeated.")] = [
        1,
        32,
        256,
    ],
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time `apply`."""
    torch.set_num_threads(1)
    table = Table(
        "columns", "nodes", "batch", "pm-mined ms", "path ms", "pieces ms", "largest ms", "path / pm-mined"
    )
    results = []
    with tempfile.TemporaryDirectory() as directory:
        target, control = load(Path(directory))
    for columns in width:
        spelled = build_table(grown(target, columns), control)
        for requests in batch:
            times = measure(spelled, columns, requests, rounds, torch.device(device))
            nodes = len(spelled.trie.starts)
            results.append({"width": columns, "nodes": nodes, "batch": requests, **times})
            ratio = times["path_ms"] / times["pm_mined_ms"]
            shown = (f"{each:.2f}" for each in (*times.values(), ratio))
            table.add_row(f"{columns:,}", f"{nodes:,}", str(requests), *shown)
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "apply", "device": device, "results": results}))


def load(directory: Path) -> tuple[ByteEncoder, ByteEncoder]:
    """The tokenizers of tekken and of Mistral v1."""
    for name in ("tekken", "mistral-v1"):
        real(name, directory).save_pretrained(directory / "saved" / name)
    saved = directory / "saved"
    return load_encoder(str(saved / "tekken")), load_encoder(str(saved / "mistral-v1"))


def grown(target: ByteEncoder, size: int) -> ByteEncoder:
    """A tokenizer with `size` tokens at least: where it has fewer, some of them with an ending."""
    tokens = target.vocabulary.tokens
    endings = (token + b"ish" for token in reversed(tokens))
    longer = (*tokens, *islice(endings, max(0, size - len(tokens))))
    return ByteEncoder(target.tokenizer, dataclasses.replace(target.vocabulary, tokens=longer))


def measure(
    spelled: MappingTable, width: int, batch: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Medians, in ms."""
    control = len(spelled.control_offsets) - 1
    rows, more = torch.randn(batch, control, device=device), torch.randn(batch, control, device=device)
    pair = Pair(spelled, width, device=device)
    to_largest, trie = rows.clone(), spelled.trie
    largest = int((trie.ends - trie.starts).argmax())
    to_largest[:, spelled.segment(int(trie.tokens[trie.starts[largest]]))[0]] = rows.max() + 1
    logits = torch.randn(batch, width, device=device)

    def timed(routing: Routing, rows: Tensor) -> float:
        node = next((node for node in routing.children.values() if node >= 0), None)
        pending = [] if node is None else [PendingSpelling(i, node, row) for i, row in enumerate(more)]
        ones = torch.ones(batch, device=device)
        shift = routing.shift(rows, ones, routing.lookahead(rows), more, pending)
        index = torch.arange(batch, device=device)
        return median_ms(lambda: logits.index_add_(0, index, shift.resolve(logits, index)), rounds, device)

    times = {f"{name.replace('-', '_')}_ms": timed(make(pair), rows) for name, make in ROUTINGS.items()}
    return {**times, "largest_ms": timed(ROUTINGS["path"](pair), to_largest)}


def median_ms(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
