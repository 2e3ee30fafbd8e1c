"""What each routing carries between two real tokenizers, on prose.

A control learns one kind of prose beside a template that knows another kind, and is applied to a target that
does not know it either. Template and target are small language models of the same prose in two vocabularies,
each only of the tokens that occur; tables are those of the whole vocabularies. What is measured is the loss
on prose of the control's kind, in nats a byte, so that vocabularies can be compared. The ceiling is the
control on its own template.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from prose import Occurring, beginning, cut
from scores import encoder_of
from trimtab_mappings import ByteEncoder, build_table
from trimtab_mappings.texts import read_texts
from trimtab_processors.alignment import Aligner
from trimtab_training import architectures
from trimtab_training.data import Item, Lesson
from trimtab_training.pretrain import pretrain
from trimtab_training.settings import ControlSettings, PretrainSettings
from trimtab_training.steer import ROUTINGS, contexts_before, last_rows, make_routing, shift_of
from trimtab_training.train import Template, answer_logits, train_control

STRENGTHS = (0.5, 1.0)
WIDTH, LAYERS = 128, 2
CONTROL_WIDTH, CONTROL_LAYERS = 64, 2
BATCH = 16  # pieces a step of training
NEVER = torch.tensor(float("-inf"))
"""The logit of a token that does not occur."""


@dataclass(frozen=True)
class Result:
    """The loss of one model on the prose of the control's kind, in nats a byte."""

    model: str
    routing: str
    strength: float
    loss: float


class Reader:
    """A small language model in the tokens that occur of one real tokenizer."""

    def __init__(self, encoder: ByteEncoder, vocabulary: Occurring, model: PreTrainedModel) -> None:
        self.encoder = encoder
        self.vocabulary = vocabulary
        self.model = model

    def items(self, texts: Sequence[str]) -> list[Item]:
        """Whole texts as answers to nothing."""
        return [Item(tuple(ids[:1]), tuple(ids[1:])) for ids in self.vocabulary(texts)["input_ids"]]

    def shifts(self, contexts: Iterable[Sequence[int]]) -> Tensor:
        """A control's rows after contexts in the tokenizer's own ids: float32 [contexts, its vocabulary].

        A token that it was never taught gets the mean, which is neutral.
        """
        rows = last_rows(self.model, [self.vocabulary.ids(each) for each in contexts])
        return self.spread(rows, rows.mean(dim=1, keepdim=True))

    def spread(self, logits: Tensor, others: Tensor) -> Tensor:
        """Logits over the tokens that occur as logits over all, of which the rest get `others`."""
        whole = others.expand(len(logits), len(self.encoder.vocabulary.tokens)).clone()
        whole[:, self.vocabulary.tokens] = logits
        return whole


class Forgetful(Template):
    """A template that keeps nothing: rows of a large vocabulary take too much room."""

    def log_probs(self, items: Sequence[Item]) -> Tensor:
        return log_softmax(answer_logits(self._model, items, self.pad_id, grad=False), dim=-1)


def main(
    *,
    base: Annotated[list[Path], typer.Option(help="Prose for the template and the target to learn.")],
    lessons: Annotated[list[Path], typer.Option(help="Prose of another kind, for the control to learn.")],
    text: Annotated[list[Path], typer.Option(help="Prose of that kind to measure on.")],
    target: Annotated[str, typer.Option(help="The target's tokenizer.")] = "tekken",
    control: Annotated[str, typer.Option(help="The template's and the control's.")] = "mistral-v1",
    routing: Annotated[list[str], typer.Option(help="May be repeated.")] = list(ROUTINGS),
    steps: Annotated[int, typer.Option(min=1, help="Of every model's training.")] = 300,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of prose to measure on.")] = 50,
    output: Annotated[Path | None, typer.Option(help="Write OUTPUT.json and OUTPUT.md as well.")] = None,
) -> None:
    """Train the three models, and measure every routing."""
    torch.set_num_threads(2)
    known = cut(read_texts(base), steps * BATCH)
    taught, texts = cut(read_texts(lessons), steps * BATCH), cut(read_texts(text), pieces)
    with tempfile.TemporaryDirectory() as directory:
        encoders = {name: encoder_of(name, Path(directory), known) for name in (target, control)}
    steered = Comparison(encoders[target], encoders[control], known, taught, texts)
    steered.train(steps)
    results = [*steered.ceiling(), *(each for name in routing for each in steered.measure(name))]
    show(results)
    prose = {"base": base, "lessons": lessons, "text": text}
    data = {
        "benchmark": "routings_on_text",
        **{key: [path.name for path in paths] for key, paths in prose.items()},
        "target": target,
        "control": control,
        "steps": steps,
        "pieces": pieces,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(data))
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(results) + "\n", encoding="utf-8")


class Comparison:
    """A template and its control, a target, and the prose they are compared on."""

    def __init__(
        self, target: ByteEncoder, control: ByteEncoder, known: list[str], taught: list[str], texts: list[str]
    ) -> None:
        self._known, self._taught, self._texts = known, taught, texts
        self._bytes = sum(len(text.encode()) for text in texts)
        every = known + taught + texts
        occurring = Occurring(target, every)
        table = build_table(target.vocabulary, control)
        # what stands for the target's tokens must have ids as well
        pieces = {int(piece) for token in occurring.tokens for piece in table.segment(token)}
        spelled = Occurring(control, every, pieces)
        torch.manual_seed(0)
        self._target = Reader(target, occurring, architectures.llama(occurring, WIDTH, LAYERS))
        self._template = Reader(control, spelled, architectures.llama(spelled, WIDTH, LAYERS))
        model = architectures.control(spelled, CONTROL_WIDTH, CONTROL_LAYERS)
        self._control = Reader(control, spelled, model)

    def train(self, steps: int) -> None:
        settings = PretrainSettings(steps=steps, batch=BATCH)
        for reader in (self._target, self._template):
            pretrain(reader.model, reader.vocabulary, self._known, settings)
        lesson = Lesson("imitate", tuple(self._control.items(self._taught)), BATCH)
        template = Forgetful(self._template.model, 0)
        train_control(template, self._control.model, [lesson], ControlSettings(steps=steps))

    def ceiling(self) -> list[Result]:
        """The template without the control and with it."""
        items = self._template.items(self._texts)
        losses = dict.fromkeys((0.0, *STRENGTHS), 0.0)
        for item in items:
            logits, shift = (
                answer_logits(reader.model, [item], 0, grad=False)
                for reader in (self._template, self._control)
            )
            for strength in losses:
                losses[strength] += total(logits + strength * shift, torch.tensor(item.answer))
        return self._results("template", "", losses)

    def measure(self, routing: str) -> list[Result]:
        """The target without the control, and with it under `routing`."""
        strategy, name = ROUTINGS[routing]
        target, control = self._target.encoder, self._control.encoder
        table = build_table(target.vocabulary, control, strategy)
        aligner = Aligner(target.vocabulary, control, table)
        route = make_routing(name, table, len(target.vocabulary.tokens))
        losses = dict.fromkeys((0.0, *STRENGTHS), 0.0)
        for item in self._target.items(self._texts):
            own = [self._target.vocabulary.tokens[token] for token in item.answer]
            logits = self._target.spread(answer_logits(self._target.model, [item], 0, grad=False), NEVER)
            contexts = [*contexts_before(aligner, [beginning(control)], own)]
            for strength in losses:
                shift = shift_of(route, self._control.shifts, contexts, logits, strength) if strength else 0
                losses[strength] += total(logits + shift, torch.tensor(own))
        return self._results("target", routing, losses)

    def _results(self, model: str, routing: str, losses: dict[float, float]) -> list[Result]:
        return [Result(model, routing, strength, loss / self._bytes) for strength, loss in losses.items()]


def total(logits: Tensor, targets: Tensor) -> float:
    """The loss of all of `targets`, int64 [tokens], in nats."""
    return float(-log_softmax(logits, dim=-1).gather(1, targets[:, None]).sum())


def cells(results: Sequence[Result]) -> list[list[str]]:
    """A line for each model and routing: the loss at each strength."""
    lines = dict.fromkeys((result.model, result.routing) for result in results)
    return [
        [model, routing, *(f"{r.loss:.3f}" for r in results if (r.model, r.routing) == (model, routing))]
        for model, routing in lines
    ]


HEAD = ["model", "routing", "without", *(f"strength {strength:g}" for strength in STRENGTHS)]


def show(results: Sequence[Result]) -> None:
    table = Table(*HEAD, title="Loss on prose of the control's kind, nats a byte")
    for line in cells(results):
        table.add_row(*line)
    Console(width=110).print(table)


def markdown(results: Sequence[Result]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *cells(results)])


if __name__ == "__main__":
    typer.run(main)
