"""The runtime beside plain transformers targets, held against the slow reference."""

from __future__ import annotations

import random
import shutil
from unittest.mock import patch

import pytest
import torch
from prometheus_client import REGISTRY
from transformers import AutoModelForCausalLM

from reference import Model, PathReference, PiecesReference, Reference
from tiny import CONTEXT, Family, sentences
from trimtab_mappings import load_encoder
from trimtab_processors import metrics
from trimtab_processors.alignment import common_prefix
from trimtab_processors.control import Target
from trimtab_processors.model import CachedSequence
from trimtab_processors.pack import DEFAULT_ROUTING, Component, Pack
from trimtab_processors.parameters import Parameters
from trimtab_processors.runtime import Request, Runtime

TOKENS = 40


class Engine:
    """A stand-in for an inference engine: requests join and leave, a step gives every one of them a token."""

    def __init__(self, directory, runtime) -> None:
        self.model = Model(directory)
        self.runtime = runtime
        self.running: dict[int, tuple[list[int], list[int], Request | None]] = {}

    def add(self, key, prompt, parameters, output=None):
        output = [] if output is None else output
        request = self.runtime.open(parameters, prompt, output) if parameters else None
        self.running[key] = (prompt, output, request)
        return output

    def remove(self, key):
        _, _, request = self.running.pop(key)
        if request:
            self.runtime.close(request)

    def step(self):
        steered = [request for _, _, request in self.running.values() if request]
        self.runtime.step(steered)
        logits = torch.stack([self.model.logits(p + o) for p, o, _ in self.running.values()])
        self.runtime.apply(logits, {i: [r] for i, (_, _, r) in enumerate(self.running.values()) if r})
        for (_, output, _), token in zip(self.running.values(), logits.argmax(dim=1).tolist(), strict=True):
            output.append(token)


def make_runtime(family: Family, name: str, tables, control=None, **options) -> Runtime:
    model = Model(family.targets[name])
    target = Target(
        name, load_encoder(str(family.targets[name])), model.network.config.vocab_size, torch.device("cpu")
    )
    return Runtime(target, {"control": str(control or family.control)}, tables=tables, **options)


ROUTINGS = {
    "pm-mined": Reference,
    "path": PathReference,
    "pieces": PiecesReference,
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_requests_that_join_and_leave_get_the_tokens_of_the_reference(family, tmp_path, name, routing):
    """Every token of a changing batch is the one that the slow reference would choose."""
    runtime = make_runtime(family, name, tmp_path, cache_bytes=1, routing=routing)
    engine = Engine(family.targets[name], runtime)
    reference = ROUTINGS[routing](engine.model, Model(family.control))
    prompts = [engine.model.tokenizer.encode(text) for text in sentences(6, seed=7)]
    strengths = [0.5, 1.0, 1.5, None, -1.0, 1.0]
    outputs = {}
    for key, (prompt, strength) in enumerate(zip(prompts, strengths, strict=True)):
        parameters = None if strength is None else Parameters(control="control", strength=strength)
        outputs[key] = engine.add(key, prompt, parameters)
        for _ in range(5):
            engine.step()
    engine.remove(0)
    engine.remove(3)
    while len(outputs[5]) < TOKENS:
        engine.step()
    for key, output in outputs.items():
        text = engine.runtime._controls["control"].aligner.prompt_text(prompts[key])
        own = reference.control.tokenizer.encode(text)
        steps = list(reference.steps(prompts[key], own, strengths[key] or 0, output))
        assert [s.token for s in steps if s.gap > 1e-4] == [
            t for t, s in zip(output, steps, strict=True) if s.gap > 1e-4
        ]


def test_a_control_that_has_let_go_shifts_nothing_and_gives_its_blocks_back_once(family, tmp_path):
    """`until` counts what was generated, before a preemption too."""
    runtime, output = make_runtime(family, "b", tmp_path), [300]
    request = runtime.open(Parameters(control="control", until=3), [5, 6], output)
    shifted = []
    with patch.object(runtime, "close", wraps=runtime.close) as closed:
        for _ in range(5):
            logits = torch.zeros(1, runtime._target.width)
            runtime.step([request])
            runtime.apply(logits, {0: [request]})
            shifted.append(bool(logits.any()))
            output.append(301)
    assert shifted == [True, True, False, False, False]
    assert closed.call_count == 1
    assert not any(sequence.blocks for sequence in request.sequences)


def row_of(runtime, prompt, output):
    request = runtime.open(Parameters(control="control"), prompt, output)
    runtime.step([request])
    return request.row


def test_tokens_that_the_engine_takes_back_leave_no_trace(family, tmp_path):
    """As vLLM does where loading a request's KV cache fails."""
    runtime, output = make_runtime(family, "b", tmp_path), [300, 301, 302, 303]
    request = runtime.open(Parameters(control="control"), [5, 6], output)
    runtime.step([request])
    output[1:] = [400]
    output.append(401)
    del output[2:]
    runtime.step([request])
    torch.testing.assert_close(request.row, row_of(runtime, [5, 6], [300, 400]), atol=1e-4, rtol=1e-4)


def test_a_context_past_the_window_keeps_its_beginning_and_its_end(family, tmp_path):
    """The row is that of the first token and the most recent ones, and the request goes on."""
    runtime = make_runtime(family, "a", tmp_path)
    control = runtime._controls["control"]
    bos, output = control._beginning[0], []
    prompt = (bos, *range(10, 240))
    request = runtime.open(Parameters(control="control", prompt=prompt), [5], output)
    plain = Model(family.control)
    for token in range(20, 80):
        runtime.step([request])
        whole = [*prompt, *output]
        start = 1 + (0 if len(whole) <= CONTEXT else CONTEXT // 2)
        torch.testing.assert_close(request.row, plain.logits([bos, *whole[start:]]), atol=2e-4, rtol=1e-4)
        output.append(token)
    assert len(whole) > CONTEXT


@pytest.mark.parametrize(
    ("said", "routing"),
    [
        ((None, None, None), DEFAULT_ROUTING),
        (("pieces", None, None), "pieces"),
        (("path", "pm-mined", None), "pm-mined"),
        (("pm-mined", "path", None), "path"),
        (("pm-mined", "pm-mined", "path"), "path"),
        (("path", "path", "pm-mined"), "pm-mined"),
    ],
)
def test_a_requests_routing_goes_before_the_models_and_that_before_the_packs(family, tmp_path, said, routing):
    pack, model, asked = said
    directory = tmp_path / "control"
    shutil.copytree(family.control, directory)
    Pack(routing=pack).save(directory)
    runtime = make_runtime(family, "b", tmp_path, control=directory, routing=model)
    request = runtime.open(Parameters(control="control", routing=asked), [5], [])
    control = runtime._controls["control"]
    assert request.routing is control.routings[routing]
    assert control.describe()["mapping"]["routing"] == (model or pack or DEFAULT_ROUTING)


def test_what_was_looked_ahead_at_is_not_computed_again_when_it_is_said(family, tmp_path):
    """Of words that begin as the control expected, only the other pieces are."""
    runtime = make_runtime(family, "b", tmp_path, routing="path")
    control = runtime._controls["control"]
    model, table = control.parts[0].model, control.table
    spellings = {token: table.segment(token).tolist() for token in table.trie.tokens.tolist()}
    output, calls, context, kept = [], [], [], 0
    request = runtime.open(Parameters(control="control", prompt=(5, 6, 7)), [5], output)
    rng, run = random.Random(0), model.run

    def counting(sequences):
        calls.append(sum(sequence.new_tokens for sequence in sequences))
        run(sequences)

    with patch.object(model, "run", counting):
        for _ in range(20):
            ahead = request.sequences[0].tokens[len(context) :]
            calls.clear()
            runtime.step([request])
            whole = [*request._alignment.tokens]
            new = whole[len(context) :]
            said = common_prefix(new, ahead)
            if whole[: len(context)] == context:
                assert calls[0] == (0 if new == ahead else max(len(new) - said, 1))
                kept += said
            context, path = whole, request.sequences[0].tokens[len(whole) :]
            assert calls[1:] == [len(path)]
            output.append(rng.choice([t for t, pieces in spellings.items() if pieces[: len(path)] == path]))
    assert kept >= 10


def expert_and_anti_expert(family, directory):
    """A pack of two models: the family's control, and one that has forgotten its second layer."""
    shutil.copytree(family.control, directory / "pack")
    shutil.copytree(family.control, directory / "pack" / "anti")
    plain = AutoModelForCausalLM.from_pretrained(family.control)
    plain.model.layers = plain.model.layers[:1]
    plain.config.num_hidden_layers = 1
    plain.save_pretrained(directory / "pack" / "anti")
    Pack(components=(Component(weight=1.5), Component(model="anti", weight=-0.5))).save(directory / "pack")
    return directory / "pack"


def test_every_model_of_a_pack_looks_ahead(family, tmp_path):
    """Of an expert and an anti-expert, the further row is the weighted sum as well."""
    pack = expert_and_anti_expert(family, tmp_path)
    runtime = make_runtime(family, "b", tmp_path, control=pack, routing="path")
    parts = [(Model(pack), 1.5), (Model(pack / "anti"), -0.5)]
    reference = PathReference(Model(family.b), parts[0][0], parts=parts)
    request = runtime.open(Parameters(control="control", prompt=(5, 6)), [5], [])
    logits = torch.randn(1, reference.target.network.config.vocab_size)
    runtime.step([request])
    shifted = logits.clone()
    runtime.apply(shifted, {0: [request]})
    expected = logits[0] + reference.shift([5, 6], 1.0, logits[0])
    torch.testing.assert_close(shifted[0], expected, atol=1e-3, rtol=1e-4)


def test_a_further_row_that_is_not_finite_leaves_the_request_alone_and_is_counted(family, tmp_path):
    """It gets its shifts again when that is over."""
    runtime = make_runtime(family, "b", tmp_path, routing="path")
    labels = {"model_name": "b", "control": "control"}
    request = runtime.open(Parameters(control="control", prompt=(5, 6)), [5], [])
    logits, complete = torch.randn(1, runtime._target.width), CachedSequence.complete
    before = REGISTRY.get_sample_value("trimtab_non_finite_shifts_total", labels)

    def breaking(sequence, row):
        complete(sequence, row * torch.nan if sequence._path else row)

    with patch.object(CachedSequence, "complete", breaking):
        runtime.step([request])
    shifted = logits.clone()
    runtime.apply(shifted, {0: [request]})
    assert torch.equal(shifted, logits)
    assert REGISTRY.get_sample_value("trimtab_non_finite_shifts_total", labels) == before + 1
    runtime.step([request])
    runtime.apply(shifted, {0: [request]})
    assert shifted.isfinite().all()
    assert not torch.equal(shifted, logits)


def rolled_back(name):
    return metrics.ROLLED_BACK.labels(name, "control")._value.get()


def test_what_is_taken_back_behind_a_moved_window_is_computed_anew(family, tmp_path):
    """Text that is tokenized anew when the context has outgrown the window."""
    runtime, rng = make_runtime(family, "b", tmp_path), random.Random(4)
    output = []
    prompt = (*runtime._controls["control"]._beginning[:1], *range(10, 240))
    request = runtime.open(Parameters(control="control", prompt=prompt), [5], output)
    plain, before = Model(family.control), None
    for _ in range(60):
        output.append(rng.randrange(20, 800))
        runtime.step([request])
        torch.testing.assert_close(
            request.row, plain.logits(request.sequences[0].tokens), atol=2e-4, rtol=1e-4
        )
        if request._dropped and before is None:
            before = rolled_back("b")
    assert rolled_back("b") > before


def test_an_engine_without_the_control_goes_on_without(family, tmp_path):
    """Nothing is opened, nothing is shifted."""
    assert make_runtime(family, "a", tmp_path).open(Parameters(control="nobody"), [5], []) is None
