"""The adapter for vLLM's V1 model runner, with batch updates as vLLM's own builder makes them."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality

from reference import Model, Reference
from tiny import sentences
from trimtab_processors.settings import command_line_settings
from trimtab_processors.vllm_v1 import ControlProcessor


def configuration(family, name, tables, *, control_cpus=(), **overrides):
    """As much of a VllmConfig as the adapter reads."""
    plugin = {
        "controls": {"control": str(family.control)},
        "tables": str(tables),
        "control_cpus": list(control_cpus),
    }
    model = SimpleNamespace(
        served_model_name=name,
        tokenizer=str(family.targets[name]),
        tokenizer_revision=None,
        get_vocab_size=lambda: Model(family.targets[name]).network.config.vocab_size,
    )
    base = {
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "additional_config": {"trimtab": plugin},
        "model_config": model,
    }
    return SimpleNamespace(**(base | overrides))


@dataclass(eq=False)
class Job:
    prompt: list[int]
    strength: float | None
    output: list[int]

    @property
    def params(self):
        xargs = {"trimtab_control": "control", "trimtab_strength": self.strength}
        return SamplingParams(extra_args=xargs if self.strength is not None else None)


class Batch:
    """A persistent batch that changes as vLLM's does: new rows take freed places, then gaps are closed."""

    def __init__(self, processor) -> None:
        self.processor = processor
        self.rows: list[Job | None] = []
        self.builder = BatchUpdateBuilder()

    def change(self, leaving: list[Job], joining: list[Job]) -> None:
        for job in leaving:
            index = self.rows.index(job)
            self.rows[index] = None
            self.builder.removed_append(index)
        for job in joining:
            index = self.builder.pop_removed()
            if index is None:
                index = len(self.rows)
                self.rows.append(None)
            self.rows[index] = job
            self.builder.added.append((index, job.params, job.prompt, job.output))
        while None in self.rows:
            gap, last = self.rows.index(None), len(self.rows) - 1
            if self.rows[last] is not None:
                self.rows[gap] = self.rows[last]
                self.builder.moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
            self.rows.pop()

    def swap(self, i: int, j: int) -> None:
        self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
        self.builder.moved.append((i, j, MoveDirectionality.SWAP))

    def step(self, model) -> None:
        self.processor.update_state(self.builder.get_and_reset(len(self.rows)))
        if not self.rows:
            return
        logits = torch.stack([model.logits(job.prompt + job.output) for job in self.rows])
        for job, token in zip(self.rows, self.processor.apply(logits).argmax(dim=1).tolist(), strict=True):
            job.output.append(token)


@pytest.mark.parametrize("control_cpus", [(), (max(os.sched_getaffinity(0)),)], ids=["before", "beside"])
def test_rows_follow_their_requests_through_every_change_of_the_batch(family, tmp_path, control_cpus):
    """Joins, leaves, moves, swaps, preemption and resumption: every token is that of the reference."""
    config = configuration(family, "b", tmp_path, control_cpus=control_cpus)
    processor = ControlProcessor(config, torch.device("cpu"), False)
    target = Model(family.b)
    reference = Reference(target, Model(family.control))
    rng, batch = random.Random(0), Batch(processor)
    prompts = [target.tokenizer.encode(text) for text in sentences(14, seed=3)]
    waiting = [Job(p, rng.choice([None, 0.5, 1.0, 1.5]), []) for p in prompts]
    jobs, preempted = list(waiting), []
    while waiting or preempted or batch.rows:
        done = [job for job in batch.rows if len(job.output) > 12]
        victims = [job for job in batch.rows if job not in done and rng.random() < 0.1]
        joining = [queue.pop() for queue in (waiting, preempted) if queue and rng.random() < 0.7]
        batch.change(done + victims, joining)
        preempted += victims
        if len(batch.rows) > 1 and rng.random() < 0.3:
            batch.swap(*rng.sample(range(len(batch.rows)), 2))
        batch.step(target)
    for job in jobs:
        text = processor._runtime._controls["control"].aligner.prompt_text(job.prompt)
        own = reference.control.tokenizer.encode(text)
        steps = list(reference.steps(job.prompt, own, job.strength or 0, job.output))
        assert job.output == [step.token for step in steps]
    assert processor._requests == {}
    assert all(p.model.pool.used == 0 for p in processor._runtime._controls["control"].parts)


def test_an_engine_that_schedules_asynchronously_is_refused_at_start(family, tmp_path):
    """With the option that helps."""
    config = configuration(family, "a", tmp_path, scheduler_config=SimpleNamespace(async_scheduling=True))
    with pytest.raises(ValueError, match="--no-async-scheduling"):
        ControlProcessor(config, torch.device("cpu"), False)


def test_a_wrong_configuration_is_refused_by_its_key(family, tmp_path):
    """At start, not at the first request."""
    config = configuration(family, "a", tmp_path, additional_config={"trimtab": {"contols": {}}})
    with pytest.raises(ValueError, match=r"trimtab\.contols"):
        ControlProcessor(config, torch.device("cpu"), False)


def test_a_control_that_the_engine_does_not_have_costs_nobody_their_request(family, tmp_path):
    """The front end refuses it; where it could not know, the request goes on without control."""
    processor = ControlProcessor(configuration(family, "a", tmp_path), torch.device("cpu"), False)
    batch, job = Batch(processor), Job([3, 4], None, [])
    batch.change([], [job])
    index, _, prompt, output = batch.builder.added[0]
    params = SamplingParams(extra_args={"trimtab_control": "nobody"})
    batch.builder.added[0] = (index, params, prompt, output)
    logits = torch.randn(1, 600)
    processor.update_state(batch.builder.get_and_reset(1))
    assert torch.equal(processor.apply(logits.clone()), logits)


@pytest.fixture
def command_line(family, monkeypatch):
    """The front end of a server that was started with the family's control."""
    config = json.dumps({"trimtab": {"controls": {"control": str(family.control)}}})
    monkeypatch.setattr(sys, "argv", ["api_server", "--model", "m", f"--additional-config={config}"])
    command_line_settings.cache_clear()
    yield
    command_line_settings.cache_clear()


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"trimtab_control": "nobody"}, "no control 'nobody' here, there is: control"),
        ({"trimtab_control": "control", "trimtab_strength": 11}, "trimtab_strength"),
        ({"trimtab_control": "control", "trimtab_prompt": [1, 600]}, "token 600 is not below the 600"),
    ],
)
@pytest.mark.usefixtures("command_line")
def test_a_wrong_request_is_refused_in_the_front_end(xargs, said):
    """Where vLLM makes a 400 of it, and no engine has seen it."""
    with pytest.raises(VLLMValidationError, match=said):
        ControlProcessor.validate_params(SamplingParams(extra_args=xargs))


@pytest.mark.usefixtures("command_line")
def test_a_right_request_passes_the_front_end():
    """With and without control."""
    assert ControlProcessor.validate_params(SamplingParams()) is None
    xargs = {"trimtab_control": "control", "trimtab_prompt": [1, 599]}
    assert ControlProcessor.validate_params(SamplingParams(extra_args=xargs)) is None
