"""What it costs to measure how far control moves the target, beside adding the shift itself.

Both as `apply` does them, on one thread. The divergence is that of one row, whatever the batch, once in as
many steps as by default; `a step` is its cost spread over all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from trimtab_processors.divergence import kl_divergence
from trimtab_processors.settings import DEFAULT_KL_EVERY


def main(
    width: Annotated[list[int], typer.Option(min=1, help="Columns of the logits; may be repeated.")] = [
        *(32_000, 128_000, 200_000)
    ],
    batch: Annotated[list[int], typer.Option(min=1, help="Requests at once; may be repeated.")] = [1, 8, 32],
    rounds: Annotated[int, typer.Option(min=1)] = 30,
) -> None:
    """Time the divergence."""
    torch.set_num_threads(1)
    table = Table("columns", "batch", "adding the shift ms", "divergence ms", "a step ms")
    results = []
    for columns in width:
        for requests in batch:
            found = {"width": columns, "batch": requests} | measure(columns, requests, rounds)
            results.append(found)
            times = (found["add_ms"], found["divergence_ms"], found["step_ms"])
            table.add_row(f"{columns:,}", str(requests), *(f"{each:.2f}" for each in times))
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "divergence", "every": DEFAULT_KL_EVERY, "results": results}))


def measure(width: int, batch: int, rounds: int) -> dict[str, float]:
    """Medians, in ms."""
    logits, shift = torch.randn(batch, width), torch.randn(batch, width)
    index = torch.arange(batch)
    add = median_ms(lambda: logits.index_add_(0, index, shift), rounds)
    divergence = median_ms(lambda: float(kl_divergence(shift[0], logits[0].clone())), rounds)
    return {"add_ms": add, "divergence_ms": divergence, "step_ms": divergence / DEFAULT_KL_EVERY}


def median_ms(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
