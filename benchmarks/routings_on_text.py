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
from trimtab_training.control.examples import Example, View, answered
from trimtab_training.control.objectives import Objective, cross_entropy
from trimtab_training.control.reference import answer_logits
from trimtab_training.control.trainer import TrainingSet
from trimtab_training.world import architectures
from trimtab_training.world.pretrain import pretrain
from trimtab_training.world.settings import ControlSettings, PretrainSettings
from trimtab_training.world.steer import ROUTINGS, contexts_before, last_rows, make_routing, shift_of
from trimtab_training.world.teaching import control_recipe, train_control

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

    def views(self, texts: Sequence[str]) -> list[View]:
        """Whole texts as answers to nothing."""
        return [answered(ids[:1], ids[1:]) for ids in self.vocabulary(texts)["input_ids"]]

    @torch.no_grad()
    def logits(self, view: View) -> Tensor:
        """The logits of a text's tokens: float32 [tokens, tokens that occur]."""
        return answer_logits(self.model, [view], 0, self.model.device)

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
        table = build_table(target, control)
        # what stands for the target's tokens must have ids as well
        pieces = {int(piece) for token in occurring.tokens for piece in table.segment(token)}
        spelled = Occurring(control, every, pieces)
        torch.manual_seed(0)
        self._target = Reader(target, occurring, architectures.llama(occurring, WIDTH, LAYERS))
        self._template = Reader(control, spelled, architectures.llama(spelled, WIDTH, LAYERS))

    def train(self, steps: int) -> None:
        settings = PretrainSettings(steps=steps, batch=BATCH)
        for reader in (self._target, self._template):
            pretrain(reader.model, reader.vocabulary, self._known, settings)
        examples = [Example(view) for view in self._template.views(self._taught)]
        sets = [TrainingSet("lessons", examples, Objective(cross_entropy), 1.0, BATCH)]
        template, vocabulary = self._template.model, self._template.vocabulary
        with tempfile.TemporaryDirectory() as directory:
            recipe = control_recipe(
                ControlSettings(steps=steps),
                width=CONTROL_WIDTH,
                layers=CONTROL_LAYERS,
                seed=0,
                output_dir=Path(directory),
            )
            model, _ = train_control(recipe, template, vocabulary, sets)
        self._control = Reader(self._template.encoder, vocabulary, model)

    def ceiling(self) -> list[Result]:
        """The template without the control and with it."""
        losses = dict.fromkeys((0.0, *STRENGTHS), 0.0)
        for view in self._template.views(self._texts):
            logits, shift = (reader.logits(view) for reader in (self._template, self._control))
            for strength in losses:
                losses[strength] += total(logits + strength * shift, torch.tensor(view.targets))
        return self._results("template", "", losses)

    def measure(self, routing: str) -> list[Result]:
        """The target without the control, and with it under `routing`."""
        strategy, name = ROUTINGS[routing]
        target, control = self._target.encoder, self._template.encoder
        table = build_table(target, control, strategy)
        aligner = Aligner(target.vocabulary, control, table)
        route = make_routing(name, table, len(target.vocabulary.tokens))
        losses = dict.fromkeys((0.0, *STRENGTHS), 0.0)
        for view in self._target.views(self._texts):
            own = [self._target.vocabulary.tokens[token] for token in view.targets]
            logits = self._target.spread(self._target.logits(view), NEVER)
            contexts = [*contexts_before(aligner, [beginning(control)], own, route)]
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
