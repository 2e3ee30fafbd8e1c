"""The device runtime on CPU tensors, against contexts built from scratch and plain transformers models."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from reference import Model
from runner import Segments
from tiny import CONTEXT
from trimtab_mappings import load_encoder
from trimtab_processors import device, metrics
from trimtab_processors.control import Target
from trimtab_processors.device import Batch, DeviceRuntime
from trimtab_processors.model import ControlModel
from trimtab_processors.pack import PackError
from trimtab_processors.parameters import Parameters
from trimtab_processors.segments import History, Late

CPU = torch.device("cpu")
POSITIONS = 3 * CONTEXT
STEERED = Parameters(control="control")


class Engine:
    """What an engine holds of its requests, and a runtime beside it."""

    def __init__(self, directory, controls, tables, *, slots=4, **options) -> None:
        self.width = Model(directory).network.config.vocab_size
        self.history = History(torch.zeros((slots, POSITIONS), dtype=torch.int32), torch.zeros(slots).int())
        self.texts: dict[int, list[int]] = {}
        controls = {name: str(place) for name, place in controls.items()}
        encoder = load_encoder(str(directory))
        target = Target("target", encoder, self.width, CPU)
        self.runtime = DeviceRuntime(target, controls, self.history, tables=tables, **options)

    def add(self, slot, prompt, parameters, output=()):
        self.texts[slot] = []
        self.history.length[slot] = 0
        self.write(slot, [*prompt, *output])
        return self.runtime.open(
            slot, [parameters] if parameters else [], len(prompt), len(prompt) + len(output)
        )

    def write(self, slot, tokens):
        start = len(self.texts[slot])
        self.texts[slot] += tokens
        self.history.tokens[slot, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.history.length[slot] += len(tokens)

    def batch(self, slots):
        rows = torch.tensor(slots, dtype=torch.int32)
        return Batch(
            np.array(slots), rows, torch.zeros_like(rows), torch.zeros_like(rows), self.lengths(rows)
        )

    def lengths(self, rows, offsets=0):
        return self.history.length[rows] + offsets

    def step(self, slots=None):
        """The shifts of each slot's row."""
        slots = [*self.texts] if slots is None else slots
        logits = torch.zeros(len(slots), self.width)
        self.runtime.begin()
        self.runtime.apply(logits, self.batch(slots))
        return dict(zip(slots, logits, strict=True))

    def control(self, number=0):
        return [*self.runtime._controls.values()][number]

    def context(self, slot, number=0):
        contexts = self.control(number).contexts
        return contexts.tokens[slot, : contexts.length[slot]].tolist()


@dataclass(frozen=True)
class Pair:
    """A target, a control, and the slow reference of both."""

    target: Path
    control: Path
    slow: Segments

    def engine(self, tables, **options) -> Engine:
        return Engine(self.target, {"control": self.control}, tables, **options)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A target and a control with spellings of several tokens before the first node."""
    root = tmp_path_factory.mktemp("deep")
    for place, tokenizer in (
        (root / "target", tiny.metaspace(900)),
        (root / "control", tiny.byte_level(330)),
    ):
        tiny.save(place, tokenizer, tiny.llama(len(tokenizer), width=64), seed=3)
    return root / "target", root / "control"


@pytest.fixture(scope="module", params=["a", "b", "c", "deep"])
def pair(request, family, deep):
    target, control = deep if request.param == "deep" else (family.targets[request.param], family.control)
    return Pair(target, control, Segments(Model(target), Model(control)))


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def tokens_of(rng, engine, count):
    """Any ids: specials, parts of characters, and past the tokenizer."""
    return [rng.randrange(engine.width) for _ in range(count)]


def test_the_controls_text_is_the_targets_text_after_every_step(pair, tmp_path):
    """Special tokens by their counterparts, bytes of unfinished characters one by one."""
    slow, engine, rng = pair.slow, pair.engine(tmp_path), random.Random(0)
    engine.add(0, [5, 6], Parameters(control="control", prompt=(7, 8)))
    output = []
    for _ in range(60):
        close(engine.step()[0], slow.shift(slow.context([5, 6], [7, 8], output)))
        assert engine.context(0) == slow.context([5, 6], [7, 8], output)
        text = b"".join(slow.bytes[token] or b"" for token in output if token < len(slow.bytes))
        assert slow.text(engine.context(0)[2:]) == text
        output += (new := tokens_of(rng, engine, 1))
        engine.write(0, new)


def test_a_resumed_request_has_the_context_that_it_had(pair, tmp_path):
    """Its output so far comes with it; a prompt that the control doesn't have is its target's text."""
    slow, engine, rng = pair.slow, pair.engine(tmp_path), random.Random(1)
    prompt, output = [1, *tokens_of(rng, engine, 30)], tokens_of(rng, engine, 20)
    for slot, own in enumerate([None, [9, 10]]):
        engine.add(slot, prompt, Parameters(control="control", prompt=own), output)
    for slot, own in enumerate([None, [9, 10]]):
        close(engine.step()[slot], slow.shift(slow.context(prompt, own, output)))


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}:
            raise AssertionError(name)
        if name in {"index", "index_put", "index_put_"}:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        return func(*args, **(kwargs or {}))


def no_waiting():
    stack = ExitStack()
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
    ):
        stack.enter_context(mock.patch.object(torch.Tensor, name, side_effect=AssertionError(name)))
    stack.enter_context(NoWaiting())
    return stack


@pytest.mark.parametrize("read", [torch.Tensor.item, lambda t: t[t > 0], lambda t: bool(t.sum())])
def test_the_check_for_host_reads_finds_them(read):
    """Else the next test would say nothing."""
    ones = torch.ones(1)
    with pytest.raises(AssertionError), no_waiting():
        read(ones)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_step_reads_nothing_from_the_device(family, tmp_path, drafts):
    """Nor does a request that joins with a prompt of the control's own."""
    engine = Engine(family.b, {"control": family.control, "other": family.a}, tmp_path, most_drafts=drafts)
    engine.add(0, [5], Parameters(control="control", top_k=9, min_p=0.01, until=90, routing="pm-mined"))
    engine.add(1, [6, 7], None)
    engine.add(2, [6, 7], Parameters(control="other", prompt=(8,)))
    engine.runtime.open(2, [Parameters(control=name, prompt=(8,)) for name in ("other", "control")], 2, 2)
    engine.step()
    with no_waiting():
        engine.add(3, [9], Parameters(control="other", prompt=(3, 4)))
    for slots in ([2, 0, 1, 3], [1, 3, 0, 2], [3, 1]):
        logits, batch = torch.zeros(len(slots) * (1 + drafts), engine.width), engine.batch(slots)
        if drafts:
            rows = batch.row_slots.repeat_interleave(1 + drafts, output_size=len(logits))
            offsets = torch.arange(1 + drafts).repeat(len(slots))
            batch = Batch(
                batch.slots, rows, offsets, torch.full_like(rows, 300), engine.lengths(rows, offsets)
            )
        with no_waiting():
            engine.runtime.begin()
            engine.runtime.apply(logits, batch)
        for slot in slots:
            engine.write(slot, [300 + slot])
        assert logits.any(dim=1).tolist() == [s != 1 for s in slots for _ in range(1 + drafts)]


@pytest.mark.parametrize(("routing", "forwards"), [("pm-mined", 1), ("path", 2)])
def test_what_was_computed_beside_the_target_is_not_computed_again(family, tmp_path, routing, forwards):
    """One batch a step, in `begin`; a request that was not there in the step before has its own."""
    engine = Engine(family.b, {"control": family.control}, tmp_path, routing=routing)
    for slot in range(3):
        engine.add(slot, [5, 6 + slot], Parameters(control="control", prompt=(8,)))
    forward = ControlModel.forward
    with mock.patch.object(ControlModel, "forward", autospec=True, side_effect=forward) as counted:
        for slots, passes in (([0, 1, 2], 1), ([2, 1, 0], 1), ([0], 1), ([1, 0], 2), ([0, 1], 1)):
            counted.reset_mock()
            engine.step(slots)
            assert counted.call_count == passes * forwards
            for slot in slots:
                engine.write(slot, [300])


def test_a_control_that_has_let_go_costs_nothing_more(family, tmp_path):
    """Its blocks go back some steps later; the slot's next request has all of it again."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    engine.add(0, [5, 6], Parameters(control="control", until=2))
    held = []
    for _ in range(8):
        engine.step()
        engine.write(0, [300])
        held.append(engine.control().blocks.held_by(np.array([0])))
    assert held[0] > 0 == held[-1]
    engine.add(0, [5, 6], Parameters(control="control", until=6))
    assert [bool(engine.step()[0].any()) for _ in range(6) if not engine.write(0, [301])] == [True] * 5 + [
        False
    ]


def test_the_row_of_a_prompt_that_is_half_read_is_not_counted(family, tmp_path):
    """The engine does not sample from it."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    engine.add(0, [5, 6, 7, 8], STEERED)
    counter = metrics.TOKENS.labels("target", "control")._value
    before, rows = counter.get(), torch.zeros(1, dtype=torch.int32)
    for length in (2, 3, 4):
        batch = Batch(np.array([0]), rows, rows, rows, torch.tensor([length]))
        engine.runtime.begin()
        engine.runtime.apply(torch.zeros(1, engine.width), batch)
    for _ in range(3):  # counts come late
        engine.runtime.begin()
    assert counter.get() == before + 1


def test_two_controls_of_one_request_see_the_targets_own_logits(family, tmp_path):
    """Whichever shifts first."""
    controls = {"control": family.control, "other": family.a}
    engine = Engine(family.b, controls, tmp_path)
    own = torch.randn(1, engine.width)

    def shift(*names):
        wanted = [Parameters(control=name, prompt=(7, 8)) for name in names]
        engine.add(0, [5], None)
        engine.runtime.open(0, wanted, 1, 1)
        logits = own.clone()
        engine.runtime.begin()
        engine.runtime.apply(logits, engine.batch([0]))
        return logits - own

    both, swapped = shift("control", "other"), shift("other", "control")
    close(both, shift("control") + shift("other"))
    close(both, swapped)


def test_what_is_not_finite_in_what_is_looked_ahead_at_reaches_no_other_request(deep, tmp_path):
    """The rows of a batch write what they look ahead at side by side; the next step writes there again."""
    target, control = deep
    engine = Engine(target, {"control": control}, tmp_path)
    weights = engine.control().control.parts[0].model._model.get_input_embeddings().weight
    engine.add(0, [5], Parameters(control="control", prompt=(7, 8)))
    rows = engine.control()
    engine.step()
    engine.write(0, [300])
    ahead, kept = rows._look_ahead, []

    def breaking(wave, places, ends, logits, extra):
        chosen = rows._path.lookahead(logits.flatten(0, 1)).tokens
        kept.append(weights[chosen].clone())
        weights[chosen] = torch.nan
        found = ahead(wave, places, ends, logits, extra)
        weights[chosen] = kept[-1]
        return found

    with mock.patch.object(rows, "_look_ahead", breaking):
        assert not engine.step()[0].any()
    assert kept
    engine.write(0, [301])
    slow = Segments(Model(target), Model(control))
    close(engine.step()[0], slow.shift(slow.context([5], [7, 8], engine.texts[0][1:])))


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_control_lets_go_after_as_many_tokens_as_the_request_wants(family, tmp_path, drafts):
    """Drafts count as they would if they were accepted; a resumed request has what it had before."""
    engine = Engine(family.b, {"control": family.control}, tmp_path, most_drafts=drafts)
    engine.add(0, [5, 6], Parameters(control="control", until=3))
    engine.add(1, [5, 6], Parameters(control="control", until=3), output=[300, 301])
    steered = {0: [], 1: []}
    for _ in range(4):
        rows = torch.arange(2, dtype=torch.int32).repeat_interleave(1 + drafts)
        offsets = torch.arange(1 + drafts).repeat(2)
        batch = Batch(
            np.array([0, 1]), rows, offsets, torch.full_like(rows, 300), engine.lengths(rows, offsets)
        )
        logits = torch.zeros(len(rows), engine.width)
        engine.runtime.begin()
        engine.runtime.apply(logits, batch)
        for slot in (0, 1):
            steered[slot].append(logits[rows == slot].any(dim=1).tolist())
            engine.write(slot, [302])
    for slot, before in ((0, 0), (1, 2)):
        assert steered[slot] == [
            [before + step + offset < 3 for offset in range(1 + drafts)] for step in range(4)
        ]


def test_a_step_that_brings_nothing_new_changes_nothing(family, tmp_path):
    """As the steps in which a request is still prefilled."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    engine.add(0, [5, 6], STEERED)
    first, context = engine.step()[0], engine.context(0)
    for _ in range(3):
        close(engine.step()[0], first)
    assert engine.context(0) == context


def test_rows_that_were_computed_ahead_are_not_taken_for_later_ones(pair, tmp_path):
    """Where a step is not begun, its rows are computed when they are wanted."""
    slow, engine = pair.slow, pair.engine(tmp_path)
    engine.add(0, [5], Parameters(control="control", prompt=(7, 8)))
    engine.step()
    engine.write(0, [300])
    logits = torch.zeros(1, engine.width)
    engine.runtime.apply(logits, engine.batch([0]))
    close(logits[0], slow.shift(slow.context([5], [7, 8], [300])))


def test_a_full_pool_costs_time_and_nothing_else(pair, tmp_path):
    """One context's worth of blocks for four requests, which lose them in turns."""
    slow, engine, rng = pair.slow, pair.engine(tmp_path, cache_bytes=1), random.Random(2)
    prompts = {slot: [rng.randrange(3, 300) for _ in range(60)] for slot in range(4)}
    for slot, own in prompts.items():
        engine.add(slot, [5], Parameters(control="control", prompt=own))
    blocks = engine.control().blocks
    for _ in range(25):
        shifts = engine.step(slots := rng.sample(range(4), rng.randint(1, 4)))
        assert blocks.pool.used <= 2 + CONTEXT // device.BLOCK_SIZE
        for slot in slots:
            output = engine.texts[slot][1:]
            close(shifts[slot], slow.shift(slow.context([5], prompts[slot], output)))
            engine.write(slot, tokens_of(rng, engine, 1))
    for slot in range(4):
        engine.runtime.open(slot, (), 1, 1)
    assert blocks.pool.used == 2  # those of padding
    assert blocks.table.max() == 0


def laid_out(engine):
    """A step's shifts, and the groups of contexts that were attended together, by forward pass."""
    forward = ControlModel.forward
    with mock.patch.object(ControlModel, "forward", autospec=True, side_effect=forward) as seen:
        return engine.step(), [call.args[1].groups for call in seen.call_args_list]


def crowd(family, tables, slots=8):
    """An engine with prompts of one token to most of a window."""
    engine, rng = Engine(family.b, {"control": family.control}, tables, slots=slots), random.Random(3)
    for slot in range(slots):
        own = [rng.randrange(3, 400) for _ in range(1 + slot * 28)]
        engine.add(slot, [5], Parameters(control="control", prompt=own))
    return engine


def test_large_steps_are_cut_into_what_memory_has_room_for(family, tmp_path, monkeypatch):
    """Several passes, several calls of attention, the same rows."""
    whole, together = laid_out(crowd(family, tmp_path))
    assert len(together) == 2  # the contexts, and what is looked ahead at
    monkeypatch.setattr(device, "MOST_TOKENS", 300)
    monkeypatch.setattr(device, "MOST_ATTENDED", 280)
    monkeypatch.setattr(device, "MAX_AHEAD", 1)
    shifts, passes = laid_out(crowd(family, tmp_path))
    assert len(passes) > 4
    assert sum(map(len, passes)) > sum(map(len, together))
    for group in (group for groups in passes for group in groups):
        assert group.slots.numel() <= 280 or len(group.slots) == 1
    for slot, shift in shifts.items():
        close(shift, whole[slot])


def test_a_long_context_does_not_make_short_ones_attend_to_as_much(family, tmp_path):
    """Contexts of like length are attended together, new ones and growing ones."""
    engine = crowd(family, tmp_path)
    slack = 2 * engine.control().contexts._segments.longest  # the host knows lengths late
    for _ in range(2):
        _, (groups, _) = laid_out(engine)
        assert 1 < len(groups) < 8
        for group in groups:
            own = device.BLOCK_SIZE * (group.positions.amax(dim=1) // device.BLOCK_SIZE + 1)
            assert (group.slots.shape[1] <= 2 * own + slack).all()
        assert sum(group.slots.numel() for group in groups) < 0.75 * 8 * CONTEXT
        for slot in range(8):
            engine.write(slot, [300])


@pytest.mark.parametrize("own", [True, False])
def test_a_context_past_the_window_keeps_its_beginning_and_its_end(family, tmp_path, own):
    """In strides of half a window, and the request goes on."""
    engine, rng = Engine(family.b, {"control": family.control}, tmp_path, slots=1), random.Random(4)
    slow, plain = Segments(Model(family.b), Model(family.control)), Model(family.control)
    bos = plain.tokenizer.bos_token_id
    counter = metrics.TRUNCATIONS.labels("target", "control")
    before = counter._value.get()
    prompt = [1, *(rng.randrange(3, 900) for _ in range(200))]
    parameters = Parameters(control="control", prompt=[bos, *range(3, 200)] if own else None)
    engine.add(0, prompt, parameters)
    starts = set()
    for _ in range(300):
        shift = engine.step()[0]
        whole = slow.context(prompt, parameters.prompt and [*parameters.prompt], engine.texts[0][201:])
        context = engine.context(0)
        assert context[0] == bos
        assert len(context) <= CONTEXT
        assert context[1:] == whole[len(whole) - len(context) + 1 :]
        assert len(context) == len(whole) or len(context) > CONTEXT // 3
        close(shift, slow.shift(context))
        starts.add(len(whole) - len(context))
        engine.write(0, [rng.randrange(3, 900)])
    assert counter._value.get() - before == len(starts - {0}) >= 3


def test_drafts_never_carry_a_context_past_the_window(family, tmp_path):
    """Room for them is made before."""
    drafts = 4
    engine = Engine(family.b, {"control": family.control}, tmp_path, slots=1, most_drafts=drafts)
    slow, rng = Segments(Model(family.b), Model(family.control)), random.Random(5)
    engine.add(0, [5], Parameters(control="control", prompt=[1, *range(3, 150)]))
    for _ in range(120):
        tokens = [5, *(rng.randrange(3, 900) for _ in range(drafts))]
        logits = torch.zeros(1 + drafts, engine.width)
        engine.runtime.begin()
        rows = torch.zeros(1 + drafts, dtype=torch.int32)
        offsets = torch.arange(1 + drafts)
        lengths = engine.lengths(rows, offsets)
        batch = Batch(np.array([0]), rows, offsets, torch.tensor(tokens), lengths)
        engine.runtime.apply(logits, batch)
        context = engine.context(0)
        for row, draft in zip(logits, range(1 + drafts), strict=True):
            chain = context + [piece for token in tokens[1 : 1 + draft] for piece in slow.segment(token)]
            assert len(chain) <= engine.control()._window
            close(row, slow.shift(chain))
        engine.write(0, tokens[1 : 1 + rng.randint(1, drafts)])


def test_more_drafts_than_a_window_has_room_for_fail_nothing(family, tmp_path):
    """What is past the window is not exact; what is in it is."""
    drafts = 150
    engine = Engine(family.b, {"control": family.control}, tmp_path, slots=1, most_drafts=drafts)
    slow, rng = Segments(Model(family.b), Model(family.control)), random.Random(7)
    engine.add(0, [5], Parameters(control="control", prompt=range(3, 123)))
    tokens = [5, *(rng.randrange(3, 900) for _ in range(drafts))]
    logits = torch.zeros(1 + drafts, engine.width)
    engine.runtime.begin()
    rows = torch.zeros(1 + drafts, dtype=torch.int32)
    offsets = torch.arange(1 + drafts)
    lengths = engine.lengths(rows, offsets)
    engine.runtime.apply(logits, Batch(np.array([0]), rows, offsets, torch.tensor(tokens), lengths))
    chains = [engine.context(0) + [p for t in tokens[1 : 1 + n] for p in slow.segment(t)] for n in range(151)]
    assert len(chains[-1]) > CONTEXT
    for row, chain in zip(logits, chains, strict=True):
        assert row.any()
        if len(chain) <= engine.control()._window:
            close(row, slow.shift(chain))


def test_nothing_is_computed_for_a_request_that_left(family, tmp_path):
    """Neither for one that ran, nor for one that had yet to join."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    engine.add(0, [5], STEERED)
    engine.step()
    engine.add(1, [5], STEERED)
    for slot in (0, 1):
        engine.runtime.open(slot, (), 1, 1)
    with mock.patch.object(ControlModel, "forward") as counted:
        engine.runtime.begin()
    assert not counted.called


def test_the_host_knows_nearly_how_long_contexts_are(family, tmp_path):
    """Never less than there is, and no more than a few steps of the longest tokens."""
    engine, rng = Engine(family.b, {"control": family.control}, tmp_path, slots=2), random.Random(6)
    engine.add(0, [5], STEERED)
    contexts = engine.control().contexts
    for step in range(80):
        if step in {30, 50}:
            engine.add(1, [6] * step, STEERED)
        engine.step()
        excess = contexts.bound - contexts.length.numpy()
        assert (excess >= 0).all()
        assert (excess <= 3 * contexts._segments.longest).all()
        engine.write(0, tokens_of(rng, engine, 1))


def test_late_values_are_two_steps_old():
    """Neither younger nor older, whatever the device is at."""
    source, given = torch.zeros(1, dtype=torch.int64), []
    late = Late(source)
    for step in range(1, 6):
        source.fill_(step)
        given.append(int(late.exchange()[0]))
    assert given == [0, 0, 1, 2, 3]


def broken(directory, place):
    """A copy of a control whose output is not finite."""
    place.mkdir()
    for file in directory.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][7] = torch.nan
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_what_is_not_finite_in_one_slots_blocks_reaches_no_later_owner(family, tmp_path):
    """Blocks go from request to request, and a context that is masked is multiplied all the same."""
    engine = Engine(family.a, {"control": family.control}, tmp_path, cache_bytes=1)
    control = engine.control()
    control.control.parts[0].model._model.get_input_embeddings().weight[7] = torch.nan
    engine.add(0, [5], Parameters(control="control", prompt=(7,) * 40))
    assert not engine.step()[0].any()
    engine.add(0, [5], None)
    for length in (3, 20, 40):
        engine.add(1, [5], Parameters(control="control", prompt=(9,) * length))
        assert engine.step([1])[1].any()
        engine.add(1, [5], None)


@pytest.mark.parametrize("routing", ["pm-mined", "path"])
def test_what_is_not_finite_in_one_context_reaches_no_other_in_the_same_step(family, tmp_path, routing):
    """Contexts of unlike length are padded to the longest of their group."""
    engine = Engine(family.b, {"control": family.control}, tmp_path, routing=routing)
    engine.control().control.parts[0].model._model.get_input_embeddings().weight[7] = torch.nan
    engine.add(0, [5], Parameters(control="control", prompt=(7,) * 44))
    engine.add(1, [5], Parameters(control="control", prompt=(9,) * 28))
    for step in range(14):
        shifts = engine.step()
        assert (bool(shifts[0].any()), bool(shifts[1].any())) == (False, True)
        for slot in (0, 1):
            engine.write(slot, [300 + step])


def test_a_shift_that_is_not_finite_leaves_its_row_alone_and_is_counted(family, tmp_path, monkeypatch):
    """One broken control costs nobody their request."""
    monkeypatch.setattr("trimtab_processors.model._equal", lambda left, right: True)
    controls = {"control": family.control, "broken": broken(family.control, tmp_path / "broken")}
    engine = Engine(family.b, controls, tmp_path)
    left, shifted = (
        metrics.NON_FINITE.labels("target", "broken")._value,
        metrics.TOKENS.labels("target", "control")._value,
    )
    before = left.get(), shifted.get()
    engine.add(0, [5], Parameters(control="broken"))
    engine.add(1, [5], STEERED)
    for _ in range(2):
        shifts = engine.step()
        assert not shifts[0].any()
        assert shifts[1].any()
    for _ in range(3):  # counts come late
        engine.runtime.begin()
    assert (left.get() - before[0], shifted.get() - before[1]) == (2, 2)


def test_a_masked_token_stays_masked_and_rows_of_others_stay_to_the_bit(family, tmp_path):
    """-inf is a grammar's; a row without control is nobody's business."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    engine.add(0, [5], STEERED)
    engine.add(1, [5], None)
    logits = torch.randn(2, engine.width)
    logits[:, ::2] = -torch.inf
    logits[1, 1] = -0.0
    before = logits.clone()
    engine.runtime.begin()
    engine.runtime.apply(logits, engine.batch([0, 1]))
    assert (logits[0, ::2] == -torch.inf).all()
    assert logits[0, 1::2].isfinite().all()
    assert not torch.equal(logits[0], before[0])
    assert torch.equal(logits[1].view(torch.int32), before[1].view(torch.int32))


def test_the_parts_of_a_pack_are_summed_by_their_weights(family, tmp_path):
    """Two models on one context: an expert and an anti-expert."""
    pack = tmp_path / "pack"
    pack.mkdir()
    components = [{"model": str(family.control), "weight": 1.5}, {"model": str(family.a), "weight": -0.5}]
    (pack / "trimtab.json").write_text(json.dumps({"name": "pack", "components": components}))
    engine = Engine(family.b, {"pack": pack}, tmp_path)
    engine.add(0, [5], Parameters(control="pack", prompt=(3, 4, 5)))
    engine.step()
    engine.write(0, [300, 301])
    engine.control().contexts.expect(np.array([0]), 2)
    parts = [(Model(family.control), 1.5), (Model(family.a), -0.5)]
    slow = Segments(Model(family.b), parts[0][0], parts=parts)
    close(engine.step()[0], slow.shift(slow.context([5], [3, 4, 5], [300, 301])))


def test_a_control_that_is_not_there_steers_nothing(family, tmp_path):
    """And the slot's last request is forgotten."""
    engine = Engine(family.a, {"control": family.control}, tmp_path)
    assert engine.add(0, [5], STEERED)
    engine.step()
    assert not engine.add(0, [5], Parameters(control="nobody"))
    assert not engine.step()[0].any()


def test_a_table_that_spells_with_tokens_that_the_model_lacks_is_refused(family, tmp_path):
    """At start: on a GPU such a token would end the engine."""
    engine = Engine(family.b, {"control": family.control}, tmp_path)
    control = engine.control().control
    fake = SimpleNamespace(
        name="control",
        table=SimpleNamespace(segment_ids=np.array([600])),
        vocab_size=600,
        max_context=control.max_context,
        routings=control.routings,
    )
    with pytest.raises(PackError, match="token 600"):
        device.DeviceControl(fake, engine.runtime._target, engine.history, most_drafts=0)
