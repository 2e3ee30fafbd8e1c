"""What a step of the control costs as the output grows: it must not grow with it.

The runtime without an engine: a target's tokens are handed to it one by one, as an engine would. `alignment`
is what brings the control's context up to date, where the generated token is one of the control's;
`realignment` where it is not, and text is tokenized anew. `forward` is the control itself, which attends to
its context, so that it grows up to the control's window and no further. Medians of the steps around each
length; the mean of the forward also holds the steps at which the window moved and the context was computed
anew.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from chart import line_chart
from models import make_model
from trimtab_mappings import cached_table, load_encoder
from trimtab_mappings.texts import read_texts
from trimtab_processors.control import Target
from trimtab_processors.parameters import Parameters
from trimtab_processors.runtime import Runtime
from vocabularies import real

# the control's tokenizer is the first's; tekken's tokens are mostly none of its
TARGETS = {"same tokenizer": "mistral-v1", "other tokenizer": "tekken"}
FIRST = 64  # tokens generated, where the figures begin
BINS = 2  # for each doubling of the length
PROMPT = 16  # tokens


@dataclass(frozen=True)
class Step:
    """What one generated token cost, in seconds."""

    length: int
    """Tokens generated so far."""
    realigned: bool
    """Whether the token is none of the control's."""
    alignment: float
    forward: float


@dataclass(frozen=True)
class Bin:
    """The steps around one length: medians, in milliseconds."""

    length: int
    alignment: float
    realignment: float | None
    """None where every token is one of the control's."""
    forward: float
    forward_mean: float
    realigned: float
    """Share of the tokens."""


def main(
    plot: Annotated[Path, typer.Option(help="The SVG to write.")],
    text: Annotated[list[Path], typer.Option(help="Prose, plain or JSONL; may be repeated.")] = [],
    tokens: Annotated[int, typer.Option(min=2 * FIRST, help="The longest output, in tokens.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Outputs for each tokenizer.")] = 2,
    shape: Annotated[str, typer.Option(help="The control's: 15M, 42M or tiny.")] = "15M",
) -> None:
    """Measure the control's step as the output grows."""
    torch.set_num_threads(1)
    prose = "\n\n".join(read_texts(text)) if text else made_up_prose()
    steps: dict[str, list[Step]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as directory:
        runtimes = make_runtimes(Path(directory), shape)
        exact = {name: exact_tokens(Path(directory), target) for name, target in TARGETS.items()}
        outputs = {
            name: token_windows(f"{directory}/{target}", prose, tokens, rounds)
            for name, target in TARGETS.items()
        }
        for index in range(rounds):
            for name, runtime in runtimes.items():
                steps[name] += generate(runtime, outputs[name][index], exact[name])
    bins = {name: summarise(found) for name, found in steps.items()}
    show(bins)
    plot.write_text(draw(bins), encoding="utf-8")
    results = {name: [asdict(each) for each in found] for name, found in bins.items()}
    settings = {"control": shape, "tokens": tokens, "rounds": rounds, "prose": [path.name for path in text]}
    print(json.dumps({"benchmark": "growth", **settings, "results": results}))


def make_runtimes(directory: Path, shape: str) -> dict[str, Runtime]:
    """One for each of `TARGETS`, all with the same control."""
    own = real("mistral-v1", directory)
    real("tekken", directory)
    make_model(directory / "control", shape, own)
    runtimes = {}
    for name, target in TARGETS.items():
        encoder = load_encoder(str(directory / target))
        beside = Target(name, encoder, len(encoder.vocabulary), torch.device("cpu"))
        runtimes[name] = Runtime(beside, {"c": str(directory / "control")}, tables=directory)
    return runtimes


def exact_tokens(directory: Path, target: str) -> list[bool]:
    """Which of the target's tokens are the control's too."""
    served, control = (load_encoder(str(directory / name)) for name in (target, "control"))
    exact: list[bool] = cached_table(served, control, directory).exact.tolist()
    return exact


def token_windows(target: str, prose: str, tokens: int, count: int) -> list[list[int]]:
    """The first `count` stretches of `prose` of so many target tokens, with a prompt before them; repeated
    where the prose ends.
    """
    length = PROMPT + tokens
    ids = load_encoder(target).encode(prose[: 8 * length * count].encode())[0]
    ids *= math.ceil(length * count / len(ids))
    return [ids[start : start + length] for start in range(0, length * count, length)]


def generate(runtime: Runtime, ids: list[int], exact: list[bool]) -> Iterator[Step]:
    """Hand an output to the runtime, token by token, after a prompt."""
    output: list[int] = []
    request = runtime.open(Parameters(control="c"), ids[:PROMPT], output)
    if request is None:
        raise RuntimeError("the runtime has no control")
    runtime.step([request])
    for length, token in enumerate(ids[PROMPT:], 1):
        output.append(token)
        start = time.perf_counter()
        request.advance()
        aligned = time.perf_counter()
        runtime.step([request])
        yield Step(length, not exact[token], aligned - start, time.perf_counter() - aligned)
    runtime.close(request)


def summarise(steps: list[Step]) -> list[Bin]:
    """Bins of lengths that grow by the same factor."""
    longest = max(step.length for step in steps)
    bins = round(BINS * math.log2(longest / FIRST)) or 1
    binned: defaultdict[int, list[Step]] = defaultdict(list)
    for step in steps:
        if step.length >= FIRST:
            place = math.log(step.length / FIRST) / math.log(longest / FIRST)
            binned[min(int(bins * place), bins - 1)].append(step)
    return [to_bin(members) for _, members in sorted(binned.items())]


def to_bin(steps: list[Step]) -> Bin:
    forward = [step.forward for step in steps]
    realigned = [step.alignment for step in steps if step.realigned]
    return Bin(
        length=round(statistics.median(step.length for step in steps)),
        alignment=1000 * statistics.median(step.alignment for step in steps if not step.realigned),
        realignment=1000 * statistics.median(realigned) if realigned else None,
        forward=1000 * statistics.median(forward),
        forward_mean=1000 * statistics.fmean(forward),
        realigned=len(realigned) / len(steps),
    )


def show(bins: dict[str, list[Bin]]) -> None:
    """Print all bins, and how much the last one cost over the first."""
    parts = ("alignment", "realignment", "forward", "forward_mean")
    table = Table("target", "tokens", *(f"{part.replace('_', ', ')} ms" for part in parts), "realigned")
    for name, found in bins.items():
        for each in found:
            cells = [getattr(each, part) for part in parts]
            table.add_row(name, f"{each.length:,}", *map(number, cells), f"{each.realigned:.1%}")
        growth = [growth_of([getattr(each, part) for each in found]) for part in parts]
        table.add_row(name, "last / first", *map(number, growth), "")
        table.add_section()
    Console(width=110).print(table)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def growth_of(values: list[float | None]) -> float | None:
    """The last over the first of those that are known."""
    known = [value for value in values if value is not None]
    return known[-1] / known[0] if known else None


def draw(bins: dict[str, list[Bin]]) -> str:
    lines = {
        f"{part}, {name}": [
            (each.length, value) for each in found if (value := getattr(each, part)) is not None
        ]
        for part in ("forward", "realignment", "alignment")
        for name, found in bins.items()
    }
    drawn = {name: points for name, points in lines.items() if points}
    return line_chart("A control's step as the output grows", "tokens generated", "milliseconds", drawn)


def made_up_prose(words: int = 60_000) -> str:
    """Sentences of made-up words, some of them far commoner than others."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghlmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    known = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    chosen = iter(rng.choices(known, weights, k=words))
    return " ".join(word.capitalize() + "." if rng.random() < 0.08 else word for word in chosen)


if __name__ == "__main__":
    typer.run(main)
