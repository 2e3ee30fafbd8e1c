"""How long a mapping table takes, and how much memory: what a server pays for a pair that it has not seen.

Every pair is built in a process of its own, on one core, without transformers and torch. `nearest` is
PM-MinED alone; `build` is the whole table, with every target token tokenized by the control. The reference's
algorithm (all pairs of tokens, edit distances of those of which one begins the other) runs on a sample, from
which its time is estimated. `read` is the CPU time from both `tokenizers.Tokenizer` to vocabularies and an
encoder. The peak is the whole memory of the process, with both tokenizers in it.

A name that `mistral_common` does not have is a directory with a tokenizer.json below TRIMTAB_REAL_MODELS:
`python benchmarks/mappings.py --pair gemma3:qwen2.5-coder --rounds 1`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
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
        "target",
        "control",
        "missing",
        "read s",
        "nearest s",
        "build s",
        "load ms",
        "peak MB",
        "x reference, estimated",
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
                *(f"{result[key]:.3f}" if result[key] else "-" for key in ("read_s", "nearest_s", "build_s")),
                f"{1000 * result['load_s']:.1f}" if result["load_s"] else "-",
                f"{result['peak_mb']:.0f}",
                f"{result['reference_s'] / result['nearest_s']:,.0f}" if result["missing"] else "-",
            )
    console.print(table)
    print(json.dumps({"benchmark": "mappings", "rounds": rounds, "results": results}))


def prepare(directory: Path, names: set[str]) -> None:
    """Write each tokenizer as one `tokenizers` file; only this needs transformers."""
    from vocabularies import REAL, real

    for name in names - {ESTRANGED}:
        path = directory / f"{name}.json"
        if name in REAL:
            real(name, directory).backend_tokenizer.save(str(path))
        else:
            shutil.copyfile(Path(os.environ["TRIMTAB_REAL_MODELS"]) / name / "tokenizer.json", path)


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
    from trimtab_mappings import ByteEncoder, MappingTable, build_table, nearest, read_vocabulary
    from trimtab_mappings.vocabulary import index_tokens

    names = [name for name in (target_name, control_name) if name != ESTRANGED]
    tokenizers = [load(directory / f"{name}.json") for name in names]
    start = time.process_time()
    target, *others = map(read_vocabulary, tokenizers)
    served = ByteEncoder(tokenizers[0], target)
    encoder = ByteEncoder(tokenizers[1], others[0]) if others else None
    read_s = time.process_time() - start
    tokens = encoder.vocabulary.tokens if encoder else estranged(target.tokens)
    index = index_tokens(tokens, encoder.vocabulary.byte_fallback if encoder else ())
    missing = [token for token in target.tokens if token and token not in index]
    times = {"nearest_s": timed(lambda: nearest(missing, index), rounds), "build_s": None, "load_s": None}
    if encoder:
        path = directory / "table.safetensors"
        build_table(served, encoder).save(path)
        times["build_s"] = timed(lambda: build_table(served, encoder), rounds)
        times["load_s"] = timed(lambda: MappingTable.load(path), rounds)
    return {
        "target_tokens": len(target),
        "control_tokens": len(tokens),
        "missing": len(missing),
        "read_s": read_s,
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
    """A saved tokenizer with what `read_vocabulary` asks of one of transformers."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    added = backend.get_added_tokens_decoder()
    roles = dict.fromkeys(f"{role}_token_id" for role in ("bos", "eos", "unk", "pad"))
    return SimpleNamespace(
        **roles,
        backend_tokenizer=backend,
        name_or_path=path.stem,
        chat_template=None,
        added_tokens_decoder=added,
        all_special_ids=[i for i, token in added.items() if token.special],
    )


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
