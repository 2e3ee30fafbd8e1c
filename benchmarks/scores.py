"""Which mapping strategy names the control's own next token most often, for real and trained tokenizers.

Tokenizers are trained on the first texts, and all tables are scored on the others: see `trimtab map score`.
Beside it, the share of the control's tokens, and of their uses, that the target spells in pieces: see
`trimtab map show`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trimtab_mappings import STRATEGIES, ByteEncoder, build_table, read_vocabulary
from trimtab_mappings.inspection import count_tokens, summarize
from trimtab_mappings.scoring import find_meetings, score
from trimtab_mappings.texts import read_texts
from vocabularies import FAMILIES, REAL, real, train

PAIRS = (
    "tekken:mistral-v1",
    "mistral-v1:tekken",
    "tekken:byte-level-4000",
    "byte-level-4000:tekken",
    "mistral-v1:unigram-8000",
    "unigram-8000:mistral-v1",
    "word-piece-8000:mistral-v1",
    "byte-level-16000:byte-level-1000",
    "byte-level-1000:byte-level-16000",
)


def main(
    training: Annotated[list[Path], typer.Option(help="Texts to train tokenizers on.")],
    text: Annotated[list[Path], typer.Option(help="Texts to score on.")],
    pair: Annotated[list[str], typer.Option(help="TARGET:CONTROL; may be repeated.")] = list(PAIRS),
) -> None:
    """Score every strategy on every pair."""
    texts = read_texts(text)
    lessons = read_texts(training)
    table = Table("target", "control", "in pieces", "by use", "places", "skipped bytes", *STRATEGIES)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        names = dict.fromkeys(name for each in pair for name in each.split(":"))
        encoders = {name: encoder_of(name, Path(directory), lessons) for name in names}
    for each in pair:
        target, control = (encoders[name] for name in each.split(":"))
        meetings = find_meetings(target, control, texts)
        built = [build_table(target, control, name) for name in STRATEGIES]
        scores = [score(one, meetings) for one in built]
        pieces = summarize(built[0], count_tokens(built[0], target, control, texts)).control_in_pieces
        in_pieces, by_use = (part / whole for part, whole in (pieces.tokens, pieces.uses or (0, 1)))
        best = max(found.accuracy for found in scores)
        table.add_row(
            *each.split(":"),
            f"{in_pieces:.1%}",
            f"{by_use:.2%}",
            f"{len(meetings.target_ids):,}",
            f"{meetings.skipped_bytes:,}",
            *(f"{found.accuracy:.2%}{' *' if found.accuracy == best else ''}" for found in scores),
        )
        shares = {"in_pieces": in_pieces, "in_pieces_by_use": by_use}
        results.append({"pair": each} | shares | {found.strategy: found.accuracy for found in scores})
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "scores", "results": results}))


def encoder_of(name: str, directory: Path, texts: list[str]) -> ByteEncoder:
    """One of `REAL`, or a family and a size: `byte-level-4000`."""
    family, _, size = name.rpartition("-")
    if name not in REAL and family not in FAMILIES:
        raise typer.BadParameter(f"{name}: one of {', '.join(REAL)}, or FAMILY-SIZE of {', '.join(FAMILIES)}")
    tokenizer = real(name, directory) if name in REAL else train(family, int(size), texts)
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer, name))


if __name__ == "__main__":
    typer.run(main)
