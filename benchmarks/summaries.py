"""Rounds of measurements as medians beside their goals, for people and for programs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from measurements import BESIDE, Against, Decode, FirstToken, Found, Off

BESIDE_GOAL = 0.98  # of the throughput without control, where the control's core is free
SERIES_GOAL = 0.95  # of the ceiling, from this batch on:
SERIES_BATCH = 8
OFF_GOAL = 0.99  # of the throughput of a server without the plugin
# times the reference's throughput, by the control's tokenizer and the batch
REFERENCE_GOALS = {("same", 16): 8.0, ("other", 16): 8.0, ("other", 1): 1.5}

Row = dict[str, Any]


class Measured(Protocol):
    @property
    def ratio(self) -> float: ...


M = TypeVar("M", bound=Measured)


def summarise(found: Found, realigned: Mapping[str, float]) -> dict[str, list[Row]]:
    """All rows of all tables.

    Args:
        found: what was measured.
        realigned: the share of the server's tokens after which it tokenized text anew, by control.
    """
    return {
        "decode": [decode_row(group) for group in grouped(found.decode, "server", "control", "batch")],
        "off": [off_row(group) for group in [*grouped(found.off, "batch"), found.off]],
        "reference": [
            reference_row(group, realigned) for group in grouped(found.against, "control", "batch")
        ],
        "first_token": [first_token_row(group) for group in grouped(found.first_tokens, "server", "control")],
    }


def grouped(measured: Iterable[M], *keys: str) -> list[list[M]]:
    """Those with the same `keys` together: what was measured in each round."""
    groups: defaultdict[tuple[Any, ...], list[M]] = defaultdict(list)
    for each in measured:
        groups[tuple(getattr(each, key) for key in keys)].append(each)
    return [members for _, members in sorted(groups.items())]


def decode_row(rounds: Sequence[Decode]) -> Row:
    first = rounds[0]
    of_ceiling = statistics.median(each.ratio / each.ceiling for each in rounds)
    row = {
        "server": first.server,
        "control": first.control,
        "batch": first.batch,
        "plain": statistics.median(each.plain for each in rounds),
        "controlled": statistics.median(each.controlled for each in rounds),
        **ratios(rounds),
        "ceiling": statistics.median(each.ceiling for each in rounds),
        "of_ceiling": of_ceiling,
    }
    if first.server == BESIDE:
        return row | goal(row["ratio"], BESIDE_GOAL)
    return row | goal(of_ceiling, SERIES_GOAL if first.batch >= SERIES_BATCH else None)


def off_row(rounds: Sequence[Off]) -> Row:
    """Both servers with the plugin together: without control, what tells them apart is idle."""
    row = {"batches": sorted({each.batch for each in rounds}), "pairs": len(rounds), **ratios(rounds)}
    return row | goal(row["ratio"], OFF_GOAL)


def reference_row(rounds: Sequence[Against], realigned: Mapping[str, float]) -> Row:
    first = rounds[0]
    row = {
        "control": first.control,
        "batch": first.batch,
        "reference": statistics.median(each.reference for each in rounds),
        "ours": statistics.median(each.ours for each in rounds),
        **ratios(rounds),
        "reference_realigned": statistics.fmean(each.realigned for each in rounds),
        "realigned": realigned[first.control],
    }
    return row | goal(row["ratio"], REFERENCE_GOALS.get((first.control.split("-")[1], first.batch)))


def first_token_row(rounds: Sequence[FirstToken]) -> Row:
    return {
        "server": rounds[0].server,
        "control": rounds[0].control,
        "plain": statistics.median(each.plain for each in rounds),
        "controlled": statistics.median(each.controlled for each in rounds),
        **ratios(rounds),
    }


def ratios(rounds: Sequence[Measured]) -> Row:
    found = [each.ratio for each in rounds]
    return {"ratio": statistics.median(found), "lowest": min(found), "highest": max(found)}


def goal(reached: float, wanted: float | None) -> Row:
    return {"goal": wanted, "met": None if wanted is None else reached >= wanted}


def print_tables(results: Mapping[str, Any]) -> None:
    console = Console(width=132)
    for table in (
        decode_table(results["decode"]),
        off_table(results["off"]),
        reference_table(results["reference"]),
        first_token_table(results["first_token"]),
        memory_table(results["memory"]),
    ):
        console.print(table)


def decode_table(rows: Sequence[Row]) -> Table:
    table = Table(
        *("forward", "control", "batch", "tok/s without", "with", "ratio", "spread"),
        *("ceiling in series", "of it", "goal"),
        title="Decoding with control over without, on the same server",
    )
    for row in rows:
        speeds = (f"{row['plain']:.1f}", f"{row['controlled']:.1f}")
        ceiling = (f"{row['ceiling']:.3f}", f"{row['of_ceiling']:.3f}")
        named = "" if row["goal"] is None else ("ratio" if row["server"] == BESIDE else "of ceiling")
        table.add_row(
            row["server"],
            row["control"],
            str(row["batch"]),
            *speeds,
            *spread(row),
            *ceiling,
            verdict(row, named),
        )
    return table


def off_table(rows: Sequence[Row]) -> Table:
    title = "Decoding without control: a server with the plugin over one without it"
    table = Table("batch", "pairs", "ratio", "spread", "goal", title=title)
    for row in rows:
        batches = ", ".join(map(str, row["batches"]))
        table.add_row(batches, str(row["pairs"]), *spread(row), verdict(row))
    return table


def reference_table(rows: Sequence[Row]) -> Table:
    table = Table(
        *("control", "batch", "tok/s reference", "ours", "times", "spread"),
        *("realigned, reference", "ours", "goal"),
        title="Decoding with control in series over the reference's, one request at a time in transformers",
    )
    for row in rows:
        speeds = (f"{row['reference']:.1f}", f"{row['ours']:.1f}")
        shares = (f"{row['reference_realigned']:.1%}", f"{row['realigned']:.1%}")
        table.add_row(row["control"], str(row["batch"]), *speeds, *spread(row), *shares, verdict(row))
    return table


def first_token_table(rows: Sequence[Row]) -> Table:
    title = "Time to the first token with control over without, one long prompt"
    table = Table("control's forward", "control", "ms without", "with", "ratio", "spread", title=title)
    for row in rows:
        times = (f"{1000 * row['plain']:.0f}", f"{1000 * row['controlled']:.0f}")
        table.add_row(row["server"], row["control"], *times, *spread(row))
    return table


def memory_table(memory: Mapping[str, Any]) -> Table:
    more = ", ".join(f"{name} {mebibytes(size)}" for name, size in memory["engine_more"].items())
    table = Table(
        *("control", "weights", "pool, at most", "a token, bytes", "a request"),
        title=f"Memory: an engine without the plugin {mebibytes(memory['engine_without'])} resident;"
        f" with all of these controls more by: {more}",
    )
    for name, row in memory["controls"].items():
        request = f"{row['request_blocks']} blocks for {row['request_tokens']} tokens"
        sizes = (mebibytes(row["weights"]), mebibytes(row["pool"]), f"{row['token']:,}")
        table.add_row(name, *sizes, request)
    return table


def spread(row: Row) -> tuple[str, str]:
    return f"{row['ratio']:.3f}", f"{row['lowest']:.3f} to {row['highest']:.3f}"


def verdict(row: Row, of: str = "") -> str:
    if row["goal"] is None:
        return ""
    return f"{of} {row['goal']} {'met' if row['met'] else 'missed'}".strip()


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
