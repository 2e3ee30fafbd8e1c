"""A template, data and a recipe that trains in a second."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import tiny
from trimtab_training.control.pair_recipe import PairRecipe
from trimtab_training.control.recipe import ControlRecipe

QUESTIONS = [
    (f"What is {word}?", f"It is {word} and more.") for word in ("bada", "cefi", "dogu", "fila", "gomu")
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "template"
    tokenizer = tiny.byte_level(400)
    tiny.save(directory, tokenizer, tiny.llama(len(tokenizer), width=64, layers=1), seed=1)
    return directory


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"instruction": question, "output": answer} for question, answer in QUESTIONS]
    return write_lines(tmp_path / "data.jsonl", rows)


def _as_rank(rank: int, port: int, run: Callable[[int], object]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    AcceleratorState._reset_state(reset_partial_state=True)
    run(rank)
    torch.distributed.destroy_process_group()


@pytest.fixture
def in_two_processes() -> Callable[[Callable[[int], object]], None]:
    """Run a function of the rank in two processes that are joined by gloo; both must end without an error."""

    def run_both(run: Callable[[int], object]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        forked = multiprocessing.get_context("fork")
        processes = [forked.Process(target=_as_rank, args=(rank, port, run)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0]

    return run_both


@pytest.fixture
def other_data(tmp_path) -> str:
    rows = [
        {"instruction": f"Where is {word}?", "output": f"Behind {word}."} for word in ("hupi", "jalo", "kemu")
    ]
    return write_lines(tmp_path / "other.jsonl", rows)


@pytest.fixture
def make_pair(template, data, other_data, tmp_path) -> Callable[..., PairRecipe]:
    """A recipe of a pair of small models, with other keys in place of its own; None leaves a key out."""

    def make(**keys: Any) -> PairRecipe:
        plain = {
            "kind": "pair",
            "control": {"model_name_or_path": str(template)},
            "plus": {"datasets": [{"path": data, "format": "alpaca"}]},
            "minus": {"datasets": [{"path": other_data, "format": "alpaca"}]},
            "output_dir": tmp_path / "out",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "seed": 3,
            "use_cpu": True,
        }
        given = {key: value for key, value in (plain | keys).items() if value is not None}
        return PairRecipe.model_validate(given)

    return make


@pytest.fixture
def make_recipe(template, data, tmp_path) -> Callable[..., ControlRecipe]:
    """A recipe of small sizes, with other keys in place of its own."""

    def make(**keys: Any) -> ControlRecipe:
        plain = {
            "template": {"model_name_or_path": str(template), "dtype": "float32"},
            "control": {"config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
            "datasets": [{"path": data, "format": "alpaca"}],
            "output_dir": tmp_path / "out",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "seed": 3,
            "use_cpu": True,
        }
        return ControlRecipe.model_validate(plain | keys)

    return make
