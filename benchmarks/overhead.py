"""What a controlled token costs, as a ratio to the same server without control.

One stock vLLM engine on one core serves a target with random weights (322 M parameters, Llama shape, 32,000
tokens) with the plugin, once with the control's forward before the target's and once beside it on another
core. Controlled and uncontrolled batches alternate, all requests of a batch at once; medians over rounds.
`ceiling` is what the forward alone would leave in series: 1 / (1 + control forward / target step).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import aiohttp
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from trimtab_processors.model import CachedSequence, ControlModel
from vocabularies import real, train

SHAPES = {
    "target": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "heads": 16},
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "heads": 6},
    "42M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "heads": 8},
}
PROMPT = 32  # tokens
CONTEXT = 1024
START_SECONDS = 300


def main(
    batch: Annotated[list[int], typer.Option(help="Requests at once; may be repeated.")] = [1, 8, 32],
    shape: Annotated[str, typer.Option(help="The control's: 15M or 42M.")] = "15M",
    tokenizer: Annotated[str, typer.Option(help="The control's: same, or other.")] = "same",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request generates.")] = 64,
) -> None:
    """Measure controlled over uncontrolled throughput."""
    table = Table("where", "batch", "tokens/s without", "with", "ratio", "spread", "ceiling in series")
    results = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        served = real("mistral-v1", directory)
        make(directory / "target", "target", served)
        own = served if tokenizer == "same" else train("byte-level", 8000, list(served.get_vocab()))
        make(directory / "control", shape, own)
        alone = {size: control_seconds(directory / "control", size, PROMPT + tokens // 2) for size in batch}
        for where, cpus in (("before", []), ("beside", [max(os.sched_getaffinity(0))])):
            with server(directory, cpus) as url:
                for size in batch:
                    pairs = asyncio.run(alternate(url, size, rounds, tokens))
                    ratios = [controlled / plain for plain, controlled in pairs]
                    plain, controlled = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
                    result = {
                        "where": where,
                        "batch": size,
                        "plain": plain,
                        "controlled": controlled,
                        "ratio": statistics.median(ratios),
                        "lowest": min(ratios),
                        "highest": max(ratios),
                        "ceiling": 1 / (1 + alone[size] * plain / size),
                    }
                    results.append(result)
                    spread = f"{result['lowest']:.3f} to {result['highest']:.3f}"
                    numbers = (f"{plain:.1f}", f"{controlled:.1f}", f"{result['ratio']:.3f}", spread)
                    table.add_row(where, str(size), *numbers, f"{result['ceiling']:.3f}")
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "overhead", "control": shape, "tokenizer": tokenizer, "results": results}))


def make(directory: Path, shape: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of this shape with random weights."""
    torch.manual_seed(0)
    kwargs = {key: value for key, value in SHAPES[shape].items() if key != "heads"}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=SHAPES[shape]["heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape != "target",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **kwargs,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def control_seconds(directory: Path, size: int, context: int) -> float:
    """One decode step of the control alone, on one thread: seconds, the median of ten."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = ControlModel(str(directory), cache_bytes=2**28, device=torch.device("cpu"))
    sequences = [CachedSequence(tokens=[5] * context) for _ in range(size)]
    model.run(sequences)
    times = []
    for _ in range(10):
        for sequence in sequences:
            sequence.change([*sequence.tokens, 7], len(sequence.tokens))
        start = time.perf_counter()
        model.run(sequences)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return statistics.median(times)


@contextlib.contextmanager
def server(directory: Path, cpus: list[int]) -> Iterator[str]:
    """A vLLM server with the plugin, its engine on the first core."""
    socket = directory / "socket"
    plugin = {
        "controls": {"c": str(directory / "control")},
        "tables": str(directory),
        "control_cpus": cpus,
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory / "target")),
        *("--served-model-name", "m", "--uds", str(socket), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(CONTEXT), "--no-async-scheduling", "--no-enable-prefix-caching"),
        *("--logprobs-mode", "processed_logprobs", "--additional-config", json.dumps({"trimtab": plugin})),
        *("--logits-processors", "trimtab_processors.vllm_v1:ControlProcessor"),
    ]
    core = min(os.sched_getaffinity(0))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        if not asyncio.run(answers(str(socket), process)):
            last = (directory / "server.log").read_text()[-3000:]
            raise RuntimeError(f"the server did not start:\n{last}")
        yield str(socket)
    finally:
        process.terminate()
        process.wait(60)
        socket.unlink(missing_ok=True)


async def answers(socket: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers; false where it ends instead, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get("http://server/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.5)
    return False


async def alternate(socket: str, size: int, rounds: int, tokens: int) -> list[tuple[float, float]]:
    """Tokens a second without and with control, round by round; the first round only warms up."""
    connector = aiohttp.UnixConnector(socket, limit=size)
    async with aiohttp.ClientSession(connector=connector) as session:
        pairs = [
            (
                await speed(session, size, tokens, controlled=False),
                await speed(session, size, tokens, controlled=True),
            )
            for _ in range(rounds + 1)
        ]
    return pairs[1:]


async def speed(session: aiohttp.ClientSession, size: int, tokens: int, *, controlled: bool) -> float:
    """Tokens a second of one batch, of which every request begins at once."""
    start = time.perf_counter()
    await asyncio.gather(*(generate(session, i, tokens, controlled=controlled) for i in range(size)))
    return size * tokens / (time.perf_counter() - start)


async def generate(session: aiohttp.ClientSession, seed: int, tokens: int, *, controlled: bool) -> None:
    """One request; sampled, so that the text is not one token over and over."""
    body = {
        "model": "m",
        "prompt": [1, *((7919 * (seed + 1) * i) % 31000 + 300 for i in range(1, PROMPT))],
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": seed,
        **({"vllm_xargs": {"trimtab_control": "c"}} if controlled else {}),
    }
    async with session.post("http://server/v1/completions", json=body) as response:
        answer = await response.json()
        if response.status != 200 or answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"status {response.status}: {answer}")


if __name__ == "__main__":
    typer.run(main)
