"""How far mode `segments` departs from `retokenize`, which is the reference.

`segments` needs no tokenizer in the loop, and for that appends each target token as its bytes spelled in
control tokens: a text that the control would cut across two target tokens stands otherwise in its context.
What that costs is measured twice. On the small world, where a trained control steers: do the answers stay
the same? And on real tokenizers, for which no control is trained: a small language model learns prose in the
control's tokens, natural as `retokenize` gives them, and is then shown both contexts of prose that it has
not seen. Its vocabulary has only the tokens that occur, or its output layer would take all the time.

Divergences are of what `segments` gives from what `retokenize` gives, in nats.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax

from prose import Occurring, beginning, cut
from scores import encoder_of
from trimtab_mappings import ByteEncoder, build_table, load_encoder
from trimtab_mappings.texts import read_texts
from trimtab_processors.alignment import Aligner, Alignment
from trimtab_processors.routing.pm_mined import PmMinedRouting
from trimtab_processors.segments import Segments
from trimtab_training.world.architectures import llama
from trimtab_training.world.cli import make_visibly
from trimtab_training.world.evaluate import Question, questions
from trimtab_training.world.pretrain import pretrain
from trimtab_training.world.settings import PretrainSettings
from trimtab_training.world.steer import Loaded, last_rows, load
from trimtab_training.world.world import World, load_world

MODES = ("retokenize", "segments")
PAIRS = (
    "tekken:mistral-v1",
    "mistral-v1:tekken",
    "tekken:byte-level-4000",
    "mistral-v1:byte-level-4000",
    "byte-level-4000:mistral-v1",
)
PROMPT = 8  # tokens of the target
WIDTH, LAYERS = 64, 2
BATCH = 32  # pieces a step of training


class Context(Protocol):
    """A control's context in one of `MODES`."""

    tokens: list[int]

    def extend(self, generated: Iterable[int]) -> object: ...


class Segmented:
    """A context in mode `segments`, as `Contexts` keeps it on the device."""

    def __init__(self, segments: Segments, prompt: Sequence[int]) -> None:
        self._segments = segments
        self.tokens = list(prompt)

    def extend(self, generated: Iterable[int]) -> None:
        tokens = torch.tensor([*generated], dtype=torch.int64)
        lengths = self._segments.lengths(tokens, 0)
        self.tokens += self._segments.joined(tokens, lengths, int(lengths.sum())).tolist()


class Pair:
    """A target and a control's tokenizer."""

    def __init__(self, target: ByteEncoder, encoder: ByteEncoder) -> None:
        self.table = build_table(target, encoder)
        self.aligner = Aligner(target.vocabulary, encoder, self.table)
        self._segments = Segments(self.table, target.vocabulary, torch.device("cpu"))

    def contexts(self, prompt: Sequence[int]) -> dict[str, Context]:
        """One for each of `MODES`, in that order."""
        return {"retokenize": Alignment(self.aligner, prompt), "segments": Segmented(self._segments, prompt)}


@dataclass(frozen=True)
class Departure:
    """How the distributions of two modes differ over some steps."""

    steps: int
    kl_mean: float
    kl_p99: float
    same_choice: float
    """Share of the steps at which the likeliest token is the same."""


@dataclass(frozen=True)
class InWorld:
    """The departure on one target of the small world."""

    target: str
    answers: int
    same_answers: float
    same_tokens: float
    other_contexts: float
    """Share of the steps at which the contexts differ anywhere."""
    departure: Departure


@dataclass(frozen=True)
class OnProse:
    """The departure on a pair of real tokenizers."""

    target: str
    control: str
    loss: float
    """Of the control's last step of training, in nats a token."""
    other_tokens: float
    """Share of the tokens in contexts of `segments` whose bytes are no token in that of `retokenize`."""
    unseen: float
    """Of these, the share that the control never saw in training."""
    other_contexts: float
    """Share of the steps at which the contexts differ anywhere."""
    everywhere: Departure
    where_other: Departure
    """At the steps at which the contexts differ."""


def main(
    *,
    training: Annotated[list[Path], typer.Option(help="Prose for tokenizers and controls to learn.")] = [],
    text: Annotated[list[Path], typer.Option(help="Prose to compare on; none: the small world only.")] = [],
    pair: Annotated[list[str], typer.Option(help="TARGET:CONTROL; may be repeated.")] = list(PAIRS),
    steps: Annotated[int, typer.Option(min=1, help="Of a control's training on prose.")] = 200,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of prose to compare on.")] = 100,
    seed: Annotated[int, typer.Option(help="The small world's.")] = 1,
    world: Annotated[
        Path | None, typer.Option(help="A small world as it is, in place of the seed's.")
    ] = None,
) -> None:
    """Compare the alignments on the small world, and on prose."""
    torch.set_num_threads(1)
    found = open_world(world, seed)
    worldly = [in_world(found, name) for name in found.models]
    show_world(worldly)
    if bool(training) != bool(text):
        raise typer.BadParameter("--training and --text go together")
    prose = on_prose(pair, read_texts(training), read_texts(text), steps, pieces) if text else []
    show_prose(prose)
    results = {"world": [asdict(each) for each in worldly], "prose": [asdict(each) for each in prose]}
    settings = {"seed": found.seed, "steps": steps, "pieces": pieces, "text": [path.name for path in text]}
    print(json.dumps({"benchmark": "alignments", **settings, **results}))


def open_world(directory: Path | None, seed: int) -> World:
    """The world in `directory` as it is; else that of `seed`, where `trimtab world` has it."""
    if directory is None:
        return make_visibly(Path(".trimtab/worlds") / str(seed), seed)
    world = load_world(directory)
    if world is None:
        raise typer.BadParameter(f"{directory} holds no world")
    return world


class Answering:
    """A target of the small world, steered at strength 1 by a control in either mode."""

    def __init__(self, target: Path, control: Path) -> None:
        self._target, self._control = load(target), load(control)
        self._pair = Pair(load_encoder(str(target)), load_encoder(str(control)))
        self._routing = PmMinedRouting(self._pair.table.mapping, self._target.model.config.vocab_size)
        self._eos = self._target.tokenizer.eos_token_id

    def answer(self, asked: Sequence[Question], lead: str) -> tuple[list[list[int]], Tensor, list[bool]]:
        """Answer with the likeliest tokens.

        Args:
            asked: chat questions.
            lead: the mode that chooses.

        Returns:
            The answers in the target's tokens; of all their steps both modes' log-probabilities,
            float32 [modes, steps, vocabulary]; and whether the contexts were the same.
        """
        prompts = [chat_prompt(self._target, question) for question in asked]
        contexts = [self._pair.contexts(chat_prompt(self._control, question)) for question in asked]
        answers: list[list[int]] = [[] for _ in asked]
        rows, same = [], []
        while live := [i for i, question in enumerate(asked) if self._goes_on(answers[i], question)]:
            rows.append(self._log_probs([prompts[i] + answers[i] for i in live], [contexts[i] for i in live]))
            same += [contexts[i]["retokenize"].tokens == contexts[i]["segments"].tokens for i in live]
            for i, token in zip(live, rows[-1][MODES.index(lead)].argmax(dim=1).tolist(), strict=True):
                answers[i].append(token)
                for context in contexts[i].values():
                    context.extend([token])
        return answers, torch.cat(rows, dim=1), same

    def _goes_on(self, answer: list[int], question: Question) -> bool:
        return len(answer) < question.max_tokens and answer[-1:] != [self._eos]

    def _log_probs(self, texts: list[list[int]], contexts: list[dict[str, Context]]) -> Tensor:
        """Both modes' log-probabilities after `texts`: float32 [modes, texts, vocabulary]."""
        logits = last_rows(self._target.model, texts)
        shifts = [
            self._routing.routed(
                last_rows(self._control.model, [context[mode].tokens for context in contexts])
            )
            for mode in MODES
        ]
        return log_softmax(torch.stack([logits + shift for shift in shifts]), dim=-1)


def chat_prompt(side: Loaded, question: Question) -> list[int]:
    messages = [{"role": "user", "content": question.text}]
    return list(side.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def in_world(world: World, name: str) -> InWorld:
    """Ask the target `name` about the people whom the control never saw, in both modes."""
    answering = Answering(world.models[name], world.control)
    asked = [question for question in questions(world.held_out) if question.kind.is_chat]
    answers, log_probs, same = answering.answer(asked, "retokenize")
    others, _, _ = answering.answer(asked, "segments")
    both = list(zip(answers, others, strict=True))
    equal = sum(a == b for one, other in both for a, b in zip(one, other, strict=False))
    return InWorld(
        target=name,
        answers=len(asked),
        same_answers=sum(one == other for one, other in both) / len(both),
        same_tokens=equal / sum(max(len(one), len(other)) for one, other in both),
        other_contexts=1 - sum(same) / len(same),
        departure=departure(*log_probs),
    )


def departure(reference: Tensor, other: Tensor) -> Departure:
    """Args: log-probabilities, float32 [steps, vocabulary]."""
    if not len(reference):
        return Departure(0, 0.0, 0.0, 1.0)
    divergences = (reference.exp() * (reference - other)).sum(dim=1).clamp(min=0).numpy()
    same = (reference.argmax(dim=1) == other.argmax(dim=1)).float().mean()
    return Departure(
        len(reference), float(divergences.mean()), float(np.percentile(divergences, 99)), float(same)
    )


@dataclass(frozen=True)
class Walk:
    """The control's contexts at each target token of some prose."""

    contexts: dict[str, list[list[int]]]
    """By mode: before each token."""
    tokens: int
    """How many the contexts of `segments` have, without prompts."""
    others: list[int]
    """Of these, those whose bytes are no token in the context of `retokenize`."""


def on_prose(
    pairs: Sequence[str], lessons: list[str], texts: list[str], steps: int, pieces: int
) -> list[OnProse]:
    """Compare on every pair, one control after another."""
    names = [each.split(":") for each in pairs]
    with tempfile.TemporaryDirectory() as directory:
        every = dict.fromkeys(name for both in names for name in both)
        encoders = {name: encoder_of(name, Path(directory), lessons) for name in every}
    lessons, texts = cut(lessons, steps * BATCH), cut(texts, pieces)
    results = []
    for control in dict.fromkeys(control for _, control in names):
        targets = [target for target, beside in names if beside == control]
        walks = {target: walk(encoders[target], encoders[control], texts) for target in targets}
        learner = Learner(encoders[control], lessons, walks.values())
        loss = learner.learn(steps)
        results += [compare(target, control, loss, learner, walks[target]) for target in targets]
    return results


def walk(target: ByteEncoder, control: ByteEncoder, texts: list[str]) -> Walk:
    """Read `texts` as a target would generate them, each after its first `PROMPT` tokens."""
    pair = Pair(target, control)
    contexts: dict[str, list[list[int]]] = {mode: [] for mode in MODES}
    tokens, others = 0, []
    for text in texts:
        ids = target.encode(text.encode())[0]
        prompt = [beginning(control), *control.encode(pair.aligner.text(ids[:PROMPT]))[0]]
        both = pair.contexts(prompt)
        for token in ids[PROMPT:]:
            for mode, context in both.items():
                contexts[mode].append([*context.tokens])
                context.extend([token])
        natural, spelled = (spans(control, both[mode].tokens[len(prompt) :]) for mode in MODES)
        tokens += len(spelled)
        others += [token for span, token in spelled.items() if span not in natural]
    return Walk(contexts, tokens, others)


def spans(encoder: ByteEncoder, tokens: Sequence[int]) -> dict[tuple[int, int], int]:
    """The tokens by where they begin and end in their text."""
    ends = accumulate((len(encoder.vocabulary.tokens[token]) for token in tokens), initial=0)
    return dict(zip(pairwise(ends), tokens, strict=True))


class Learner:
    """A small control that learns prose."""

    def __init__(self, encoder: ByteEncoder, lessons: list[str], walks: Iterable[Walk]) -> None:
        read = (token for each in walks for some in each.contexts.values() for ids in some for token in ids)
        self._lessons = lessons
        self._vocabulary = Occurring(encoder, lessons, read)
        torch.manual_seed(0)
        self._model = llama(self._vocabulary, WIDTH, LAYERS)

    def learn(self, steps: int) -> float:
        """Returns: the loss of the last step, in nats a token."""
        settings = PretrainSettings(steps=steps, batch=BATCH, warmup=min(20, steps))
        return pretrain(self._model, self._vocabulary, self._lessons, settings)

    def log_probs(self, contexts: Iterable[Sequence[int]]) -> Tensor:
        """float32 [contexts, tokens that occur]."""
        known = [self._vocabulary.ids(context) for context in contexts]
        return log_softmax(last_rows(self._model, known), dim=-1)

    def was_taught(self, token: int) -> bool:
        return token in self._vocabulary.taught


def compare(target: str, control: str, loss: float, learner: Learner, walked: Walk) -> OnProse:
    """Show the control both contexts of every step."""
    reference, other = (learner.log_probs(walked.contexts[mode]) for mode in MODES)
    differ = torch.tensor(
        [one != two for one, two in zip(*(walked.contexts[mode] for mode in MODES), strict=True)]
    )
    return OnProse(
        target,
        control,
        loss,
        other_tokens=len(walked.others) / walked.tokens,
        unseen=sum(not learner.was_taught(token) for token in walked.others) / max(len(walked.others), 1),
        other_contexts=float(differ.float().mean()),
        everywhere=departure(reference, other),
        where_other=departure(reference[differ], other[differ]),
    )


def show_world(results: list[InWorld]) -> None:
    table = Table(
        "target", "answers", "same", "same tokens", "steps", "other contexts", "KL mean", "KL p99",
        "same choice", title="On the small world, strength 1, greedy",
    )  # fmt: skip
    for each in results:
        table.add_row(
            each.target.upper(),
            f"{each.answers:,}",
            f"{each.same_answers:.2%}",
            f"{each.same_tokens:.2%}",
            f"{each.departure.steps:,}",
            f"{each.other_contexts:.1%}",
            *cells(each.departure),
        )
    Console(width=120).print(table)


def show_prose(results: list[OnProse]) -> None:
    """A row for all steps of a pair, and one for those at which the contexts differ."""
    table = Table(
        "target", "control", "loss", "other tokens", "unseen", "steps", "", "KL mean", "KL p99",
        "same choice", title="On prose, a small control",
    )  # fmt: skip
    for each in results:
        shares = (f"{each.loss:.2f}", f"{each.other_tokens:.2%}", f"{each.unseen:.0%}")
        rows = {"all": each.everywhere, f"other contexts ({each.other_contexts:.1%})": each.where_other}
        for kind, found in rows.items():
            table.add_row(each.target, each.control, *shares, f"{found.steps:,}", kind, *cells(found))
        table.add_section()
    Console(width=140).print(table)


def cells(found: Departure) -> tuple[str, str, str]:
    return f"{found.kl_mean:.2g}", f"{found.kl_p99:.2g}", f"{found.same_choice:.2%}"


if __name__ == "__main__":
    typer.run(main)
