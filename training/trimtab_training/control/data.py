"""The data sets of a recipe as examples, with what a model card says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_training.control.examples import Example, ExampleEncoder, View
from trimtab_training.control.formats import DataError, Record, local_file, read_records
from trimtab_training.control.objectives import make_objective
from trimtab_training.control.recipe import DataSet, TrainRecipe
from trimtab_training.control.trainer import TrainingSet


@dataclass(frozen=True)
class DataFacts:
    """What a data set holds.

    sha256: of each of its files.
    answer_tokens: the number of tokens that are learned.
    shortened: the number of records whose answers were cut at `max_length`.
    """

    name: str
    objective: str
    weight: float
    sha256: dict[str, str]
    records: int
    answer_tokens: int
    shortened: int


@dataclass(frozen=True)
class Data:
    """The data sets, ready to be trained on."""

    sets: tuple[TrainingSet, ...]
    facts: tuple[DataFacts, ...]


def prepare_data(recipe: TrainRecipe, encoder: ExampleEncoder) -> Data:
    """Read and encode all data sets.

    Raises:
        DataError: something in one can't be trained on.
    """
    names = _names(recipe.datasets)
    prepared = [
        _prepare(recipe, data_set, name, encoder)
        for data_set, name in zip(recipe.datasets, names, strict=True)
    ]
    return Data(tuple(made for made, _ in prepared), tuple(facts for _, facts in prepared))


def _names(data_sets: Sequence[DataSet]) -> list[str]:
    """A name for each: its own, or its file's, with a number if another one has the same."""
    names: list[str] = []
    for data_set in data_sets:
        name = data_set.name or Path(data_set.paths[0]).stem
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names


def _prepare(
    recipe: TrainRecipe, data_set: DataSet, name: str, encoder: ExampleEncoder
) -> tuple[TrainingSet, DataFacts]:
    records = read_records(data_set)
    before = encoder.shortened
    examples = [example for record in records for example in _examples(record, data_set, encoder)]
    return (
        TrainingSet(name, examples, make_objective(data_set), data_set.weight, recipe.batch_size(data_set)),
        DataFacts(
            name=name,
            objective=data_set.objective,
            weight=data_set.weight,
            sha256={path: file_hash(local_file(path)) for path in data_set.paths},
            records=len(records),
            answer_tokens=sum(len(example.view.positions) for example in examples),
            shortened=encoder.shortened - before,
        ),
    )


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
