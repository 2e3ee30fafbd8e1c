"""The adapter for vLLM's V1 model runner, with batch updates as vLLM's own builder makes them."""

from __future__ import annotations

import json
import os
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError

from batch import Batch, Job, configuration
from reference import Model, PathReference, PiecesReference, Reference
from tiny import sentences
from trimtab_processors import metrics
from trimtab_processors.settings import _LOGPROBS_MODE, command_line_logprobs_mode, command_line_settings
from trimtab_processors.vllm_v1 import ControlProcessor


def decode(batch: Batch, model: Model) -> None:
    """A step of the engine: every row's likeliest token."""
    batch.update()
    if not batch.rows:
        return
    logits = torch.stack([model.logits(job.prompt + job.output) for job in batch.rows])
    for job, token in zip(batch.rows, batch.processor.apply(logits).argmax(dim=1).tolist(), strict=True):
        job.output.append(token)


@pytest.mark.parametrize("control_cpus", [(), (max(os.sched_getaffinity(0)),)], ids=["before", "beside"])
def test_rows_follow_their_requests_through_every_change_of_the_batch(family, tmp_path, control_cpus):
    """Joins, leaves, moves, swaps, preemption and resumption: every token is that of the reference."""
    config = configuration(family, "b", tmp_path, control_cpus=control_cpus)
    processor = ControlProcessor(config, torch.device("cpu"), False)
    target = Model(family.b)
    control = Model(family.control)
    kinds = {"pm-mined": Reference, "path": PathReference, "pieces": PiecesReference}
    references = {routing: kind(target, control) for routing, kind in kinds.items()}
    rng, batch = random.Random(0), Batch(processor)
    prompts = [target.tokenizer.encode(text) for text in sentences(14, seed=3)]
    waiting = [
        Job(p, rng.choice([None, 0.5, 1.0, 1.5]), [], routing=rng.choice([*references])) for p in prompts
    ]
    jobs, preempted = list(waiting), []
    while waiting or preempted or batch.rows:
        done = [job for job in batch.rows if len(job.output) > 12]
        victims = [job for job in batch.rows if job not in done and rng.random() < 0.1]
        joining = [queue.pop() for queue in (waiting, preempted) if queue and rng.random() < 0.7]
        batch.change(done + victims, joining)
        preempted += victims
        if len(batch.rows) > 1 and rng.random() < 0.3:
            batch.swap(*rng.sample(range(len(batch.rows)), 2))
        decode(batch, target)
    for job in jobs:
        text = processor._runtime._controls["control"].aligner.prompt_text(job.prompt)
        own = control.tokenizer.encode(text)
        steps = list(references[job.routing].steps(job.prompt, own, job.strength or 0, job.output))
        assert job.output == [step.token for step in steps]
    assert processor._requests == {}
    assert all(p.model.pool.used == 0 for p in processor._runtime._controls["control"].parts)


def test_an_engine_that_schedules_asynchronously_is_refused_at_start(family, tmp_path):
    """With the option that helps."""
    config = configuration(family, "a", tmp_path, scheduler_config=SimpleNamespace(async_scheduling=True))
    with pytest.raises(ValueError, match="--no-async-scheduling"):
        ControlProcessor(config, torch.device("cpu"), False)


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False), (2, True), (3, False)])
def test_one_rank_counts_for_all_that_shift_the_same_logits(family, tmp_path, monkeypatch, rank, counts):
    """Of two stages of two ranks each, the first of each stage."""
    silenced = []
    monkeypatch.setattr(metrics, "silence", lambda: silenced.append(rank))
    parallel = SimpleNamespace(rank=rank, tensor_parallel_size=2)
    config = configuration(family, "a", tmp_path, parallel_config=parallel)
    ControlProcessor(config, torch.device("cpu"), False)
    assert silenced == ([] if counts else [rank])


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
    forget_the_command_line()
    yield
    forget_the_command_line()


def forget_the_command_line():
    for known in (command_line_settings, command_line_logprobs_mode):
        known.cache_clear()


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


CONTROLLED = {"trimtab_control": "control"}
OF_THE_PROMPT = [
    {"prompt_logprobs": 5},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": -1},
    {"prompt_logprob_token_ids": [[1, 2]], "max_tokens": 1},
]
OF_THE_OUTPUT = [{"logprobs": 0}, {"logprobs": 5}, {"logprob_token_ids": [1, 2]}]


@pytest.mark.parametrize("asked", OF_THE_PROMPT, ids=str)
@pytest.mark.usefixtures("command_line")
def test_log_probabilities_of_the_prompt_are_refused_under_a_control(asked):
    """vLLM passes no token of a prompt through a processor."""
    with pytest.raises(VLLMValidationError, match="without the control") as caught:
        ControlProcessor.validate_params(SamplingParams(extra_args=CONTROLLED, **asked))
    assert caught.value.parameter == "prompt_logprobs"
    assert ControlProcessor.validate_params(SamplingParams(**asked)) is None


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ([], True),
        (["--logprobs-mode", "raw_logprobs"], True),
        (["--logprobs_mode=raw_logits"], True),
        (["--logprobs-mode=processed_logprobs"], False),
        (["--logprobs-mode=processed_logits"], False),
        (["--config", "flags.yaml"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", OF_THE_OUTPUT, ids=str)
@pytest.mark.usefixtures("command_line")
def test_log_probabilities_of_the_output_are_refused_where_they_are_raw(monkeypatch, flags, refused, asked):
    """Under a control; a file of flags, which the front end does not read, may say otherwise."""
    monkeypatch.setattr(sys, "argv", [*sys.argv, *flags])
    controlled = SamplingParams(extra_args=CONTROLLED, **asked)
    if refused:
        with pytest.raises(VLLMValidationError, match="this server's --logprobs-mode is raw") as caught:
            ControlProcessor.validate_params(controlled)
        assert caught.value.parameter == "logprobs"
    else:
        assert ControlProcessor.validate_params(controlled) is None
    assert ControlProcessor.validate_params(SamplingParams(**asked)) is None


@pytest.mark.parametrize("asked", OF_THE_OUTPUT, ids=str)
def test_offline_the_front_end_can_not_know_the_mode_and_the_engine_warns(asked, family, tmp_path, caplog):
    assert ControlProcessor.validate_params(SamplingParams(extra_args=CONTROLLED, **asked)) is None
    config = configuration(family, "a", tmp_path)
    ControlProcessor(config, torch.device("cpu"), is_pin_memory=False)
    assert "--logprobs-mode" not in caplog.text
    config.model_config.logprobs_mode = "raw_logprobs"
    ControlProcessor(config, torch.device("cpu"), is_pin_memory=False)
    assert "--logprobs-mode is raw_logprobs, so that `logprobs` are those of the model without" in caplog.text


def test_vllm_has_no_other_field_for_numbers_of_the_prompt():
    """A new one fails here, until somebody decides what a control does to it."""
    assert {field for field in SamplingParams.__struct_fields__ if "prompt" in field} == {
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
        "routed_experts_prompt_start",  # which experts read the prompt: not a probability
    }
    assert {field for field in SamplingParams.__struct_fields__ if "logprob" in field} == {
        *("logprobs", "logprob_token_ids", "flat_logprobs"),
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
    }


def test_raw_log_probabilities_are_vllms_default():
    assert ModelConfig.logprobs_mode == _LOGPROBS_MODE


@pytest.mark.usefixtures("command_line")
def test_a_right_request_passes_the_front_end():
    """With and without control."""
    assert ControlProcessor.validate_params(SamplingParams()) is None
    xargs = {"trimtab_control": "control", "trimtab_prompt": [1, 599]}
    assert ControlProcessor.validate_params(SamplingParams(extra_args=xargs)) is None
