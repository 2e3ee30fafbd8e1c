"""What holds of the control beside every request, whatever a batch does to it."""

from __future__ import annotations

import random
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from batch import Batch, Job, configuration
from reference import Model, PathReference, PiecesReference, Reference, unfinished
from tiny import CONTEXT
from trimtab_processors.model import CachedSequence
from trimtab_processors.parameters import MAX_TOP_K, Parameters
from trimtab_processors.vllm_v1 import ControlProcessor

STEPS = 12
PLENTY = 2**21
ROUTINGS = ["pm-mined", "path", "pieces"]
STRENGTHS = [None, 0.0, 0.5, 1.0, -1.5, 3.0]


def property_of(examples):
    """A failure is shown as it was found: to shrink a history takes minutes."""
    return settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Steered:
    """One target of the family under the control: the adapter, its parts, and the slow reference."""

    def __init__(self, family, name, tables) -> None:
        self.name = name
        config = configuration(family, name, tables)
        self.processor = ControlProcessor(config, torch.device("cpu"), False)
        self.runtime = self.processor._runtime
        self.control = self.runtime._controls["control"]
        self.model = self.control.parts[0].model
        models = Model(family.targets[name]), Model(family.control)
        self.reference = Reference(*models, window=CONTEXT)
        self.references = {
            "pm-mined": self.reference,
            "path": PathReference(*models, window=CONTEXT),
            "pieces": PiecesReference(*models, window=CONTEXT),
        }
        self.width = self.reference.target.network.config.vocab_size
        self.bos = self.reference.control.tokenizer.bos_token_id

    def restart(self, cache_bytes):
        """As after loading, with a pool of another size."""
        self.processor._requests.clear()
        self.runtime._steering = []
        self.model._owners.clear()
        self.model._make_pool(cache_bytes)

    @property
    def sequences(self):
        return [sequence for (r,) in self.processor._requests.values() for sequence in r.sequences]

    @property
    def left_alone(self):
        """The rows left alone since their shift was not finite, so far."""
        labels = {"model_name": self.name, "control": "control"}
        return REGISTRY.get_sample_value("trimtab_non_finite_shifts_total", labels) or 0

    def generated(self, most):
        """Target tokens: any, also past the vocabulary; specials and parts of characters more often."""
        data = self.reference.target.bytes
        specials = [token for token, spelled in enumerate(data) if spelled is None]
        pieces = [token for token, spelled in enumerate(data) if spelled and not is_text(spelled)]
        kinds = [
            st.integers(0, self.width + 3),
            *(st.sampled_from(kind) for kind in (specials, pieces) if kind),
        ]
        return st.lists(st.one_of(kinds), max_size=most)

    def shift(self, job, logits):
        """That of a job, from its whole context."""
        if not job.strength:
            return torch.zeros(self.width)
        reference = self.references[job.routing]
        prompt = self.control.prompt(job.prompt, job.own)
        contexts = [prompt + generated for generated in reference.contexts(job.output)]
        return reference.shift_after(job.output, contexts, job.strength, logits)

    def check(self, rows, logits, shifted, broken=()):
        """Every row of `shifted` is `logits` and its job's shift, computed from nothing; without control, or
        where that is broken, it is the same to the bit.
        """
        for row, job in enumerate(rows):
            shift = self.shift(job, logits[row]) * (row not in broken)
            least = logits[row].sort(descending=True).values[min(job.top_k or self.width, self.width) - 1]
            expected = logits[row] + shift * (logits[row] >= least)
            tolerance = 1e-4 * float(shift.abs().max())
            torch.testing.assert_close(shifted[row], expected, atol=tolerance, rtol=0)


def is_text(data):
    return data.decode(errors="ignore").encode() == data


@pytest.fixture(scope="module", params=["a", "b", "c"])
def steered(request, family, tmp_path_factory):
    return Steered(family, request.param, tmp_path_factory.mktemp("tables"))


@st.composite
def jobs(draw, steered, routings):
    """Requests with and without control, its own prompt and a guard; many soon outgrow the window."""
    rng = random.Random(draw(st.integers(0, 999)))
    long = draw(st.sampled_from([8, 64, CONTEXT - 2, CONTEXT - 2]))
    own = [steered.bos] * rng.randint(0, 1) + rng.choices(range(steered.control.vocab_size), k=long)
    return Job(
        prompt=rng.choices(range(steered.width), k=rng.randint(0, long)),
        strength=draw(st.sampled_from(STRENGTHS)),
        output=draw(steered.generated(3)),
        own=draw(st.sampled_from([None, own, own])),
        top_k=draw(st.sampled_from([None, None, 1, 20, MAX_TOP_K])),
        routing=draw(st.sampled_from(routings)),
    )


def some(data, items, most=None):
    return data.draw(st.lists(st.sampled_from(items), unique=True, max_size=most)) if items else []


def history(steered, data, routings=ROUTINGS):
    """The batch after each update of a run in which jobs join, leave, come back, swap rows and grow.

    Those that leave for a while are preempted ones, or paused between two turns; the last update empties it.
    """
    batch, away = Batch(steered.processor), []
    for _ in range(data.draw(st.integers(1, STEPS))):
        for job in batch.rows:
            job.output += data.draw(steered.generated(3))
            taken_back = data.draw(st.sampled_from([0, 0, 0, 0, 1, 4]))
            del job.output[max(0, len(job.output) - taken_back) :]
        leaving = some(data, batch.rows, 2) if data.draw(st.booleans()) else []
        away += leaving
        resumed = some(data, away, 2)
        away = [job for job in away if job not in resumed]
        batch.change(leaving, [*resumed, *data.draw(st.lists(jobs(steered, routings), max_size=2))])
        if len(batch.rows) > 1 and data.draw(st.booleans()):
            batch.swap(*data.draw(st.permutations(range(len(batch.rows))))[:2])
        batch.update()
        yield batch
    batch.change(list(batch.rows), [])
    batch.update()
    yield batch


def logits_of(steered, data, rows):
    """Those of a target that knows nothing, or anything."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    return data.draw(st.sampled_from([0, 1, 5])) * torch.randn(len(rows), steered.width, generator=generator)


@property_of(60)
@given(data=st.data())
def test_nothing_but_an_unfinished_character_stands_between_the_two_texts(steered, data):
    """After every step, whatever came in it and whatever was taken back."""
    target, output = steered.reference.target, []
    request = steered.runtime.open(Parameters(control="control", prompt=(5, 9)), [], output)
    for _ in range(data.draw(st.integers(1, STEPS))):
        output += data.draw(steered.generated(4))
        del output[len(output) - min(len(output), data.draw(st.sampled_from([0, 0, 0, 1, 5]))) :]
        request.advance()
        context = request.sequences[0].tokens
        spelled = [target.bytes[token] if token < len(target.bytes) else b"" for token in output]
        run = spelled[max((i + 1 for i, data in enumerate(spelled) if data is None), default=0) :]
        text = b"".join(steered.reference.control.bytes[token] or b"" for token in context[2:])
        whole = b"".join(data or b"" for data in spelled)
        assert context[:2] == [5, 9]
        assert whole in (text, text + unfinished(b"".join(run)))


@property_of(30)
@given(data=st.data(), cache_bytes=st.integers(1, PLENTY))
def test_every_row_is_shifted_as_if_its_control_had_computed_it_from_nothing(steered, data, cache_bytes):
    """Through every change of the batch, also where the pool is too small for it; the others stay."""
    steered.restart(cache_bytes)
    for batch in history(steered, data):
        if data.draw(st.booleans()):  # else every prompt is half-read, and no logits are wanted
            logits = logits_of(steered, data, batch.rows)
            steered.check(batch.rows, logits, steered.processor.apply(logits.clone()))


@property_of(30)
@given(data=st.data())
def test_a_row_whose_control_is_not_finite_is_left_alone_and_counted_once(steered, data):
    """Wherever that happens; the others of its batch get their shifts, and so does it when that is over."""
    steered.restart(PLENTY)
    used = [token for token in steered.reference.mapping if token >= 0]
    complete, broken, last = CachedSequence.complete, set(), {}
    expected = steered.left_alone

    def complete_or_break(sequence, row):
        broken.discard(sequence)
        if data.draw(st.booleans()):
            broken.add(sequence)
            row[data.draw(st.sampled_from(used))] = data.draw(
                st.sampled_from([torch.nan, torch.inf, -torch.inf])
            )
        complete(sequence, row)

    with patch.object(CachedSequence, "complete", complete_or_break):
        for batch in history(steered, data, routings=["pm-mined"]):
            logits = logits_of(steered, data, batch.rows)
            shifted = steered.processor.apply(logits.clone())
            requests = {row: request for row, (request,) in steered.processor._requests.items()}
            hit = [row for row, request in requests.items() if request.sequences[0] in broken]
            steered.check(batch.rows, logits, shifted, hit)
            lengths = {request: len(batch.rows[row].output) for row, request in requests.items()}
            expected += sum(last.get(requests[row]) != lengths[requests[row]] for row in hit)
            last |= lengths
    assert steered.left_alone == expected


@property_of(40)
@given(data=st.data(), cache_bytes=st.integers(1, PLENTY))
def test_every_block_belongs_to_a_sequence_of_the_batch_or_is_free(steered, data, cache_bytes):
    """At every forward pass and after every step; none is lost, and none has two owners."""
    steered.restart(cache_bytes)
    pool = steered.model.pool

    def check_blocks():
        held = [block for sequence in steered.sequences for block in sequence.blocks]
        assert pool.used == len(held)
        assert sorted(chain(held, pool._free)) == list(range(pool.blocks))

    def forward(step, tokens, positions, wanted):
        check_blocks()
        return torch.zeros(len(wanted), steered.control.vocab_size)

    with patch.object(steered.model, "forward", forward):
        for _ in history(steered, data):
            check_blocks()
    assert steered.sequences == []
    assert pool.used == 0
