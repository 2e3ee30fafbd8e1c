"""The data sets of a recipe as examples, with what a model card says of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab_training.control.examples import Example, ExampleEncoder, View, answered, with_system
from trimtab_training.control.formats import DataError, Record, local_file, read_records
from trimtab_training.control.generate import Generate, Prompt
from trimtab_training.control.objectives import make_objective
from trimtab_training.control.recipe import DataSet, TrainRecipe
from trimtab_training.control.taught import TaughtEncoder
from trimtab_training.control.teacher_server import Teach
from trimtab_training.control.trainer import TrainingSet


@dataclass(frozen=True)
class DataFacts:
    """What a data set holds.

    sha256: of each of its files.
    answer_tokens: the number of tokens that are learned.
    shortened: the number of records whose answers were cut at `max_length`.
    teacher_mass: the mean probability of the tokens that a server gave; None without one.
    """

    name: str
    objective: str
    weight: float
    sha256: dict[str, str]
    records: int
    answer_tokens: int
    shortened: int
    teacher_mass: float | None = None


@dataclass(frozen=True)
class Data:
    """The data sets, ready to be trained on."""

    sets: tuple[TrainingSet, ...]
    facts: tuple[DataFacts, ...]


@dataclass(frozen=True)
class Reading:
    """A data set as it was read: its examples, or its questions if their answers are to be generated."""

    data_set: DataSet
    name: str
    records: int
    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    shortened: int


@dataclass(frozen=True)
class Question:
    """A record without its answer, and what the control reads and the template answers to: often the same."""

    record: Record
    prompt: Prompt
    answered: Prompt


def read_data(data_sets: Sequence[DataSet], encoder: ExampleEncoder) -> list[Reading]:
    """Read and encode all data sets.

    Raises:
        DataError: something in one can't be trained on.
    """
    names = _names(data_sets)
    return [_read(data_set, name, encoder) for data_set, name in zip(data_sets, names, strict=True)]


def _read(data_set: DataSet, name: str, encoder: ExampleEncoder) -> Reading:
    records, before = read_records(data_set), encoder.shortened
    examples: list[Example] = []
    questions: list[Question] = []
    for record in records:
        if data_set.answers == "generate":
            questions.append(_question(record, data_set, encoder))
        else:
            examples += _examples(record, data_set, encoder)
    cut = encoder.shortened - before
    return Reading(data_set, name, len(records), tuple(examples), tuple(questions), cut)


def complete_data(
    recipe: TrainRecipe,
    readings: Sequence[Reading],
    encoder: ExampleEncoder,
    generate: Generate | None = None,
    teach: Teach | None = None,
) -> Data:
    """Generate the answers that are missing, or have a teacher behind a server give them.

    Only a reading with questions needs `generate` or `teach`.
    """
    completed = [_completed(recipe, reading, encoder, generate, teach) for reading in readings]
    return Data(tuple(made for made, _ in completed), tuple(facts for _, facts in completed))


def _names(data_sets: Sequence[DataSet]) -> list[str]:
    """A name for each: its own, or its file's, with a number if another one has the same."""
    names: list[str] = []
    for data_set in data_sets:
        name = data_set.name or Path(data_set.paths[0]).stem
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(
            next(each for each in (name, *itertools.islice(numbered, len(names))) if each not in names)
        )
    return names


def _completed(
    recipe: TrainRecipe,
    reading: Reading,
    encoder: ExampleEncoder,
    generate: Generate | None,
    teach: Teach | None,
) -> tuple[TrainingSet, DataFacts]:
    data_set, examples, before = reading.data_set, reading.examples, encoder.shortened
    if teach is not None and data_set.server is not None:
        examples = _taught(reading, encoder, teach)
    elif generate is not None and reading.questions:
        asked = [question.answered for question in reading.questions]
        answers = generate(asked, data_set.max_new_tokens)
        examples = tuple(
            _generated(question, answer, data_set, encoder)
            for question, answer in zip(reading.questions, answers, strict=True)
        )
    objective = make_objective(data_set)
    return (
        TrainingSet(reading.name, examples, objective, data_set.weight, recipe.batch_size(data_set)),
        DataFacts(
            name=reading.name,
            objective=data_set.objective,
            weight=data_set.weight,
            sha256={path: file_hash(local_file(path)) for path in data_set.paths},
            records=reading.records,
            answer_tokens=sum(len(example.view.positions) for example in examples),
            shortened=reading.shortened + encoder.shortened - before,
            teacher_mass=_kept_mass(examples),
        ),
    )


def _question(record: Record, data_set: DataSet, encoder: ExampleEncoder) -> Question:
    prompt = encoder.question(record)
    told = data_set.teacher.system_prompt if data_set.teacher and not data_set.server else None
    return Question(record, prompt, prompt if told is None else encoder.question(record, told))


def _generated(
    question: Question, answer: Sequence[int], data_set: DataSet, encoder: ExampleEncoder
) -> Example:
    """An example of the template's own answer, of equal length for the control and for a teacher."""
    kept = answer[: encoder.room(max(len(question.prompt), len(question.answered)))]
    view = answered(question.prompt, kept)
    return Example(view, answered(question.answered, kept) if data_set.teacher else None)


def _taught(reading: Reading, encoder: ExampleEncoder, teach: Teach) -> tuple[Example, ...]:
    """The examples of a teacher behind a server."""
    data_set, made = reading.data_set, TaughtEncoder(encoder)
    told = data_set.teacher.system_prompt if data_set.teacher else None
    asked = [with_system(question.record.messages or (), told) for question in reading.questions]
    taught = zip(reading.questions, teach(data_set, asked), strict=True)
    if data_set.objective == "distill":
        return tuple(
            made.distributions(question.record, question.prompt, answer) for question, answer in taught
        )
    return tuple(made.said(question.record, answer) for question, answer in taught)


def _kept_mass(examples: Sequence[Example]) -> float | None:
    """The mean probability that a teacher's distributions keep exactly."""
    rests = [example.taught.rest for example in examples if example.taught is not None]
    return 1 - float(torch.cat(rests).exp().mean()) if rests else None


def _examples(record: Record, data_set: DataSet, encoder: ExampleEncoder) -> list[Example]:
    views = encoder.views(record)
    if data_set.teacher is None:
        return [Example(view) for view in views]
    taught = encoder.views(record, data_set.teacher.system_prompt)
    return [_aligned(record, view, teacher) for view, teacher in zip(views, taught, strict=True)]


def _aligned(record: Record, view: View, teacher: View) -> Example:
    """An example whose teacher reads the same answer behind another prompt."""
    if view.targets != teacher.targets:
        raise DataError(
            f"{record.place}: with the teacher's system prompt its answer is cut or split into other tokens."
            " Raise `max_length`"
        )
    return Example(view, teacher)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
