"""What both runtimes count, held against what happened; each test has a model name of its own."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from reference import Model
from tiny import Family
from trimtab_mappings import load_encoder
from trimtab_processors import metrics
from trimtab_processors.control import Target
from trimtab_processors.device import Batch, DeviceRuntime
from trimtab_processors.divergence import kl_divergence
from trimtab_processors.parameters import SEVERAL, Parameters
from trimtab_processors.runtime import Runtime
from trimtab_processors.segments import LAG, History
from trimtab_server.metrics import Metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
CPU = torch.device("cpu")
PROMPT = [5, 6]
STEERED = Parameters(control="control", prompt=(7, 8))


def value(name: str, model: str, control: str | None = "control") -> float | None:
    labels = {"model_name": model} | ({} if control is None else {"control": control})
    return REGISTRY.get_sample_value(f"trimtab_{name}", labels)


def target_of(family: Family, name: str) -> Target:
    """The family's target b, whose tokens are mostly not the control's."""
    width = Model(family.b).network.config.vocab_size
    return Target(name, load_encoder(str(family.b)), width, CPU)


def on_host(family: Family, tables: Path, name: str, **options) -> Runtime:
    controls = {each: str(family.control) for each in ("control", "other")}
    return Runtime(target_of(family, name), controls, tables=tables, **options)


LENGTH = torch.tensor([10**6])


class OnDevice:
    """The device runtime with a request in slot 0 that has what `write` wrote."""

    def __init__(self, family: Family, tables: Path, name: str, **options) -> None:
        self._history = History(torch.zeros((1, 200), dtype=torch.int32), torch.zeros(1).int())
        controls = {each: str(family.control) for each in ("control", "other")}
        target = target_of(family, name)
        self.runtime = DeviceRuntime(target, controls, self._history, tables=tables, **options)
        self.width = target.width

    def open(self, *parameters: Parameters, output: list[int]) -> None:
        self.write(PROMPT + output)
        self.runtime.open(0, parameters, len(PROMPT), len(PROMPT) + len(output))

    def write(self, tokens: list[int]) -> None:
        start = int(self._history.length[0])
        self._history.tokens[0, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self._history.length[0] += len(tokens)

    def step(self, logits: torch.Tensor) -> None:
        rows = torch.zeros(1, dtype=torch.int32)
        self.runtime.begin()
        self.runtime.apply(logits, Batch(np.array([0]), rows, rows, rows, LENGTH))

    def settle(self) -> None:
        """Counts come late."""
        for _ in range(LAG + 1):
            self.runtime.begin()


def tokens_of(target: Target, count: int) -> list[int]:
    """Any ids: specials, parts of characters, and past the tokenizer."""
    rng = random.Random(0)
    return [rng.randrange(target.width) for _ in range(count)]


def is_text(target: Target, token: int) -> bool:
    return token < len(target.vocabulary.tokens) and token not in target.vocabulary.special


def test_every_metric_of_a_control_is_there_before_anything_happened(family, tmp_path):
    """A rate has to see zero before one."""
    runtime = on_host(family, tmp_path, "quiet")
    for name in ("controlled_tokens_total", "non_finite_shifts_total", "shift_kl_nats_count"):
        assert value(name, "quiet") == 0
    for name in ("steps_total", "unknown_control_requests_total", "blocking_seconds_total"):
        assert value(name, "quiet", None) == 0
    blocks = runtime.controls[0].parts[0].model.pool.blocks
    assert value("block_capacity", "quiet") == blocks > 0


@pytest.mark.parametrize("resumed", [0, 20])
def test_the_host_counts_a_token_once_though_its_request_is_resumed(family, tmp_path, resumed):
    name = f"host-{resumed}"
    runtime, target = on_host(family, tmp_path, name), target_of(family, name)
    tokens = tokens_of(target, 60)
    output = tokens[:resumed]
    request = runtime.open(STEERED, PROMPT, output)
    for token in tokens[resumed:]:
        runtime.step([request])
        output.append(token)
    runtime.step([request])
    text = [token for token in tokens[resumed:] if is_text(target, token)]
    exact = sum(runtime.controls[0].aligner.exact[token] for token in text)
    assert value("aligned_tokens_total", name) == len(text)
    assert 0 < value("exact_tokens_total", name) <= exact  # a token behind half a character is not
    assert 0 < value("realignments_total", name) <= len(text) - value("exact_tokens_total", name)


@pytest.mark.parametrize("resumed", [0, 20])
def test_the_device_counts_a_token_once_though_its_request_is_resumed(family, tmp_path, resumed):
    name = f"device-{resumed}"
    engine, target = OnDevice(family, tmp_path, name), target_of(family, name)
    tokens = tokens_of(target, 60)
    engine.open(STEERED, output=tokens[:resumed])
    for token in tokens[resumed:]:
        engine.step(torch.zeros(1, target.width))
        engine.write([token])
    engine.step(torch.zeros(1, target.width))
    engine.settle()
    text = [token for token in tokens[resumed:] if is_text(target, token)]
    exact = engine.runtime.controls[0].table.exact
    assert value("aligned_tokens_total", name) == len(text)
    assert value("exact_tokens_total", name) == sum(bool(exact[token]) for token in text)
    assert value("controlled_tokens_total", name) == len(tokens) - resumed + 1


@pytest.mark.parametrize("names", [["control"], ["control", "other"]])
def test_the_divergence_is_that_of_the_row_that_was_sampled_from(family, tmp_path, names):
    """Of a request with several controls it is that of their sum."""
    wanted = [Parameters(control=name, strength=2, prompt=(7, 8)) for name in names]
    counted = names[0] if len(names) == 1 else SEVERAL
    model = f"moved-{len(names)}"
    runtime, device = (
        on_host(family, tmp_path, model, kl_every=2),
        OnDevice(family, tmp_path, f"{model}-device", kl_every=2),
    )
    requests = [runtime.open(each, PROMPT, []) for each in wanted]
    device.open(*wanted, output=[])
    own, moved = torch.randn(1, device.width), []
    for _ in range(6):
        runtime.step(requests)
        logits, again = own.clone(), own.clone()
        runtime.apply(logits, {0: requests})
        device.step(again)
        torch.testing.assert_close(logits, again, atol=1e-4, rtol=1e-4)
        moved.append(float(kl_divergence(logits[0], own[0])))
    device.settle()
    for name in (model, f"{model}-device"):
        assert value("shift_kl_nats_count", name, counted) == 3
        assert value("shift_kl_nats_sum", name, counted) == pytest.approx(sum(moved[1::2]), rel=1e-3)


def test_a_target_whose_own_logits_are_broken_spoils_no_sum(family, tmp_path):
    runtime = on_host(family, tmp_path, "broken", kl_every=1)
    request = runtime.open(STEERED, PROMPT, [])
    runtime.step([request])
    runtime.apply(torch.full((1, target_of(family, "broken").width), torch.nan), {0: [request]})
    assert value("shift_kl_nats_sum", "broken") == 0


def test_the_time_for_a_controls_rows_is_its_own(family, tmp_path):
    runtime = on_host(family, tmp_path, "timed")
    runtime.step([runtime.open(STEERED, PROMPT, [])])
    assert value("control_forward_seconds_total", "timed") > 0
    assert value("control_forward_seconds_total", "timed", "other") == 0


def test_the_document_has_every_metric_with_its_labels_and_no_other():
    """Of the plugin and of the gateway."""
    rows = re.findall(r"^\| `(trimtab_\w+)` \| (\w+) \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels in rows}
    plugin = [*metrics.OF_MODELS, *metrics.OF_CONTROLS]
    gateway = [each for each in vars(Metrics()).values() if isinstance(each, MetricWrapperBase)]
    assert documented == {exposed_name(each): (each._type, [*each._labelnames]) for each in plugin + gateway}


def exposed_name(metric) -> str:
    return metric._name + ("_total" if metric._type == "counter" else "")


def test_tokens_that_the_engine_takes_back_are_counted_once(family, tmp_path):
    """As vLLM does where loading a request's KV cache fails."""
    runtime, target = on_host(family, tmp_path, "taken-back"), target_of(family, "taken-back")
    tokens = [token for token in tokens_of(target, 60) if is_text(target, token)][:20]
    output = []
    request = runtime.open(STEERED, PROMPT, output)
    output += tokens[:10]
    runtime.step([request])
    del output[5:]
    runtime.step([request])
    output += tokens[10:]
    runtime.step([request])
    assert value("aligned_tokens_total", "taken-back") == 20


def test_the_device_shows_the_blocks_of_its_last_step_and_none_of_who_has_gone(family, tmp_path):
    engine = OnDevice(family, tmp_path, "blocks")
    engine.open(STEERED, output=[])
    engine.step(torch.zeros(1, engine.width))
    engine.runtime.begin()
    assert value("blocks_in_use", "blocks") > 0
    engine.runtime.begin()
    assert value("blocks_in_use", "blocks") == 0


def test_a_control_that_is_unloaded_has_no_cache_any_more(family, tmp_path):
    for runtime in (on_host(family, tmp_path, "left"), OnDevice(family, tmp_path, "left-device").runtime):
        runtime.unload("control")
    for name in ("left", "left-device"):
        assert value("block_capacity", name) == 0
        assert value("block_capacity", name, "other") > 0


def test_a_step_is_counted_once_and_what_held_it_up_is_a_part_of_it(family, tmp_path):
    """On the device also where `apply` is called for parts of a step."""
    engine = OnDevice(family, tmp_path, "steps")
    engine.runtime.begin()
    rows = torch.zeros(1, dtype=torch.int32)
    engine.runtime.apply(torch.zeros(1, engine.width), Batch(np.array([0]), rows, rows, rows, LENGTH))
    assert value("blocking_seconds_total", "steps", None) == 0  # nobody is under control
    engine.open(STEERED, output=[])
    engine.step(torch.zeros(1, engine.width))
    engine.runtime.apply(torch.zeros(1, engine.width), Batch(np.array([0]), rows, rows, rows, LENGTH))
    assert value("steps_total", "steps", None) == 1
    blocked = value("blocking_seconds_total", "steps", None)
    assert 0 < blocked <= value("step_seconds_total", "steps", None)
