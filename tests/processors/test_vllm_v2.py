"""The adapter for vLLM's V2 model runner, beside a stand-in of that runner made of vLLM's own classes."""

from __future__ import annotations

import json
import logging
import random
import sys
from itertools import chain
from unittest import mock

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

import trimtab_processors
from reference import Model, Segmented, SegmentedPath
from runner import Job, Runner, Segments, configuration, request_state
from tiny import sentences
from trimtab_processors import vllm_v1
from trimtab_processors.parameters import Parameters, parse_xargs, to_xargs
from trimtab_processors.settings import command_line_settings
from trimtab_processors.vllm_v2 import ControlProcessor

TOKENS = 14


def jobs(target, controls, count, seed=0):
    """Requests with no, one or several controls, with and without a prompt of the control's own."""
    rng = random.Random(seed)

    def parameters(control):
        own = tuple(rng.randrange(3, 500) for _ in range(rng.randint(1, 30)))
        return Parameters(
            control=control,
            strength=rng.choice([0.5, -1.0]),
            prompt=rng.choice([own, None]),
            top_k=rng.choice([None, None, 1, 7, 1024]),
            min_p=rng.choice([None, None, 0.05]),
            until=rng.choice([None, None, 5]),
            routing=rng.choice([None, "path", "pm-mined"]),
        )

    made = []
    for number, text in enumerate(sentences(count, seed=seed + 3)):
        names = rng.sample(list(controls), rng.randint(1, len(controls)))
        xargs = to_xargs([*map(parameters, names)]) if number % 4 else None
        prompt = [target.tokenizer.bos_token_id] * (number % 2) + target.tokenizer.encode(text)
        made.append(Job(f"request-{number}", prompt, xargs, TOKENS))
    return made


def references_of(target, controls):
    """The slow references by control and routing; without one, it is path routing."""
    kinds = {"pm-mined": Segmented, "path": SegmentedPath, None: SegmentedPath}
    return {
        (name, routing): Segments(target, Model(place), kind)
        for name, place in controls.items()
        for routing, kind in kinds.items()
    }


def guarded(row, shift, parameters):
    """The shift of what the target itself finds likely, if the request says so."""
    likeliest = row.before.argsort(descending=True)[: parameters.top_k]
    probabilities = row.before.softmax(dim=0)
    likely = probabilities >= (parameters.min_p or 0) * probabilities.max()
    return torch.zeros_like(shift).scatter(0, likeliest, shift[likeliest]) * likely


def check(rows, references):
    """Every row that is sampled from has the slow references' shifts; no other request's has changed."""
    checked = 0
    for row in rows:
        if row.job.xargs is None:
            assert torch.equal(row.before, row.after)
        elif row.sampled:
            expected = row.before.clone()
            for each in parse_xargs(row.job.xargs):
                if each.until is not None and len(row.output) >= each.until:
                    continue
                reference = references[each.control, each.routing]
                context = reference.context(row.job.prompt, each.prompt and [*each.prompt], row.output)
                expected += guarded(row, reference.shift(context, each.strength, row.before), each)
            torch.testing.assert_close(row.after, expected, atol=2e-4, rtol=1e-4)
            checked += 1
    return checked


@pytest.mark.parametrize("cache_bytes", [1, 10_000_000], ids=["pool-of-one-context", "pool-with-room"])
@pytest.mark.parametrize("engine", [("a", 0, 1), ("b", 0, 2), ("b", 3, 1), ("c", 2, 2)], ids=str)
def test_every_row_has_the_shift_of_the_reference(family, tmp_path, engine, cache_bytes):
    """Whatever joins, leaves, is half prefilled, preempted, resumed, drafted or rejected."""
    name, drafts, parts = engine
    directory, controls = family.targets[name], {"control": family.control}
    target = Model(directory)
    config = configuration(directory, controls, tmp_path, drafts=drafts, cache_bytes=cache_bytes)
    runner = Runner(config, target, slots=5, drafts=drafts, parts=parts)
    references = references_of(target, controls)
    rows = list(chain(*runner.run(jobs(target, controls, 8))))
    assert check(rows, references) > 5 * TOKENS
    assert any(not row.sampled for row in rows)
    assert (max(map(len, (row.output for row in rows))) > TOKENS) == bool(drafts)


@pytest.mark.parametrize("drafts", [0, 2])
def test_controls_of_different_tokenizers_steer_side_by_side(family, tmp_path, drafts):
    """Each request by its own, in one batch."""
    target, controls = Model(family.c), {"control": family.control, "other": family.b}
    runner = Runner(
        configuration(family.c, controls, tmp_path, drafts=drafts), target, slots=6, drafts=drafts, seed=1
    )
    references = references_of(target, controls)
    made = jobs(target, controls, 8, seed=1)
    named = [{each.control for each in parse_xargs(job.xargs)} for job in made if job.xargs]
    assert {"control", "other"} in named
    assert any(len(names) == 1 for names in named)
    check(chain(*runner.run(made)), references)


def test_a_control_that_the_engine_does_not_have_costs_nobody_their_request(family, tmp_path):
    """The front end refuses it; where it could not know, the request goes on without control."""
    target = Model(family.a)
    runner = Runner(configuration(family.a, {"control": family.control}, tmp_path), target, slots=2)
    runner.add(Job("lost", [3, 4], {"trimtab_control": "nobody"}, 3))
    assert not runner.steered.any()
    (row,) = runner.step()
    assert torch.equal(row.before, row.after)


def test_one_name_gives_each_model_runner_its_own_class():
    """The loaders of vLLM take a name, and refuse a class that is not of their interface."""
    name = ("trimtab_processors:ControlProcessor",)
    with mock.patch.object(vllm_v1.ControlProcessor, "validate_params") as v1:
        validate_logits_processors_parameters(name, SamplingParams())
    with mock.patch.object(ControlProcessor, "validate_params") as v2:
        build_custom_logits_processors_params_validator(name)(SamplingParams())
    assert (v1.call_count, v2.call_count) == (1, 1)
    assert trimtab_processors.ControlProcessor is vllm_v1.ControlProcessor
    with pytest.raises(AttributeError, match="ControlProcesor"):
        trimtab_processors.ControlProcesor  # noqa: B018


def test_the_start_says_in_one_line_what_runs(family, tmp_path, caplog):
    """Which runner, which alignment, which controls."""
    with caplog.at_level(logging.INFO, logger="trimtab_processors"):
        config = configuration(family.a, {"control": family.control}, tmp_path)
        ControlProcessor(config, request_state(2, 600))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert all(word in line for word in ("V2", "segments", "control"))


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"contols": {}}, r"trimtab\.contols"),
        ({"control_cpus": [1]}, "V1 model runner"),
        ({"routing": "pieces"}, "'control': routing 'pieces': vLLM's V2 model runner has only the routings"),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(family, tmp_path, plugin, said):
    """At start, not at the first request."""
    config = configuration(family.a, {"control": family.control}, tmp_path, **plugin)
    with pytest.raises(ValueError, match=said):
        ControlProcessor(config, request_state(2, 600))


@pytest.fixture
def command_line(family, monkeypatch):
    """The front end of a server that was started with the family's control."""
    config = json.dumps({"trimtab": {"controls": {"control": str(family.control)}}})
    monkeypatch.setattr(sys, "argv", ["api_server", "--model", "m", f"--additional-config={config}"])
    command_line_settings.cache_clear()
    yield
    command_line_settings.cache_clear()


@pytest.mark.usefixtures("command_line")
def test_the_front_end_refuses_what_is_wrong_and_lets_pass_what_is_right():
    """Where vLLM makes a 400 of it, and no engine has seen it."""
    with pytest.raises(VLLMValidationError, match="no control 'nobody' here, there is: control"):
        ControlProcessor.validate_params(SamplingParams(extra_args={"trimtab_control": "nobody"}))
    right = {"trimtab_control": "control", "trimtab_routing": "pm-mined"}
    with pytest.raises(
        VLLMValidationError, match="trimtab_routing: 'pieces': vLLM's V2 model runner has only"
    ):
        ControlProcessor.validate_params(SamplingParams(extra_args=right | {"trimtab_routing": "pieces"}))
    with pytest.raises(VLLMValidationError, match="`prompt_logprobs` can't be used under a control"):
        ControlProcessor.validate_params(SamplingParams(extra_args=right, prompt_logprobs=0))
    ControlProcessor.validate_params(SamplingParams(extra_args=right))
    ControlProcessor.validate_params(SamplingParams())
