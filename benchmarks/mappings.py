"""How long a mapping table takes, and how much memory: what a server pays for a pair that it has not seen.

Every pair is built in a process of its own, on one core, without transformers and torch. `nearest` is
PM-MinED alone; `build` is the whole table, with every target token tokenized by the control. The reference's
algorithm (all pairs of tokens, edit distances of those of which one begins the other) runs on a sample, from
which its time is estimated. The peak is the whole memory of the process, with both tokenizers in it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

PAIRS = (
    "tekken:mistral-v1",
    "mistral-v1:tekken",
    "mistral-v1:mistral-v3",
    "tekken:tekken-2",
    "tekken:estranged",
)
ESTRANGED = "estranged"  # as many tokens as tekken's, of which hardly one is the same: the worst case


def main(
    pair: Annotated[list[str], typer.Option(help="TARGET:CONTROL; may be repeated.")] = list(PAIRS),
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed; the median counts.")] = 5,
    sample: Annotated[int, typer.Option(min=1, help="Target tokens for the reference's algorithm.")] = 40,
) -> None:
    """Time mapping tables between real vocabularies."""
    console = Console(width=110)
    table = Table(
        "target", "control", "missing", "nearest s", "build s", "load ms", "peak MB", "x reference, estimated"
    )
    results = []
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), {name for each in pair for name in each.split(":")})
        for each in pair:
            target, control = each.split(":")
            result = in_a_process(Path(directory), target, control, rounds, sample)
            results.append({"target": target, "control": control} | result)
            table.add_row(
                f"{target} {result['target_tokens']:,}",
                f"{control} {result['control_tokens']:,}",
                f"{result['missing']:,}",
                *(f"{result[key]:.3f}" if result[key] else "-" for key in ("nearest_s", "build_s")),
                f"{1000 * result['load_s']:.1f}" if result["load_s"] else "-",
                f"{result['peak_mb']:.0f}",
                f"{result['reference_s'] / result['nearest_s']:,.0f}" if result["missing"] else "-",
            )
    console.print(table)
    print(json.dumps({"benchmark": "mappings", "rounds": rounds, "results": results}))


def prepare(directory: Path, names: set[str]) -> None:
    """Write each tokenizer as one `tokenizers` file; only this needs transformers."""
    from vocabularies import real

    for name in names - {ESTRANGED}:
        real(name, directory).backend_tokenizer.save(str(directory / f"{name}.json"))


def in_a_process(directory: Path, *arguments: object) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(directory), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(directory: Path, target_name: str, control_name: str, rounds: int, sample: int) -> dict[str, Any]:
    """Measure one pair, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from trimtab_mappings import MappingTable, build_table, nearest
    from trimtab_mappings.vocabulary import index_tokens

    target = load(directory / f"{target_name}.json").vocabulary
    if control_name == ESTRANGED:
        encoder, tokens = None, estranged(target.tokens)
    else:
        encoder = load(directory / f"{control_name}.json")
        tokens = encoder.vocabulary.tokens
    index = index_tokens(tokens, encoder.vocabulary.byte_fallback if encoder else ())
    missing = [token for token in target.tokens if token and token not in index]
    times = {"nearest_s": timed(lambda: nearest(missing, index), rounds), "build_s": None, "load_s": None}
    if encoder:
        path = directory / "table.safetensors"
        build_table(target, encoder).save(path)
        times["build_s"] = timed(lambda: build_table(target, encoder), rounds)
        times["load_s"] = timed(lambda: MappingTable.load(path), rounds)
    return {
        "target_tokens": len(target),
        "control_tokens": len(tokens),
        "missing": len(missing),
        **times,
        "peak_mb": peak_mb(),
        "reference_s": reference_seconds(missing, list(index), sample),
    }


def timed(run: Callable[[], object], rounds: int) -> float:
    """The median of `rounds` runs, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mb() -> float:
    """The most memory that this process has had; getrusage's figure would be its parent's too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def load(path: Path) -> Any:
    """The encoder of a saved tokenizer, without transformers."""
    from tokenizers import Tokenizer

    from trimtab_mappings import ByteEncoder, Vocabulary
    from trimtab_mappings.decoding import byte_tokens, read_tokens

    backend = Tokenizer.from_file(str(path))
    special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    spelled = read_tokens(backend, path.stem)
    tokens = tuple(b"" if i in special else token for i, token in enumerate(spelled))
    vocabulary = Vocabulary(
        path.stem, tokens, special, {}, False, path.stem, byte_fallback=byte_tokens(backend, tokens)
    )
    return ByteEncoder(SimpleNamespace(backend_tokenizer=backend), vocabulary)


def estranged(tokens: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The same tokens, each with a tail that none of them has: every one has a neighbour, none a twin."""
    return tuple(token and token + b"\xf5" for token in tokens)


def reference_seconds(missing: list[bytes], control: list[bytes], sample: int) -> float:
    """What all of `missing` would take by the reference's algorithm, in seconds, from a sample of them."""
    from rapidfuzz.distance import Levenshtein

    if not missing:
        return 0.0
    some = random.Random(0).sample(missing, min(sample, len(missing)))
    start = time.perf_counter()
    for token in some:
        candidates = [other for other in control if token.startswith(other) or other.startswith(token)]
        min((Levenshtein.distance(token, other) for other in candidates), default=None)
    return (time.perf_counter() - start) / len(some) * len(missing)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        where, one, other, *numbers = sys.argv[2:]
        print(json.dumps(measure(Path(where), one, other, *map(int, numbers))))
    else:
        typer.run(main)
