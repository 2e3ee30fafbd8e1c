"""Path routing against the formula, written out in loops over the target's tokens."""

from __future__ import annotations

import dataclasses
from functools import cache
from math import log

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hand_made
import tiny
from reference import Model, PathReference, PiecesReference
from trimtab_mappings import ByteEncoder, build_table, read_vocabulary
from trimtab_mappings.trie import ROOT
from trimtab_processors.routing.base import Pair
from trimtab_processors.routing.pieces import PendingSpelling
from trimtab_processors.routing.registry import ROUTINGS

MAKERS = {"byte-level": tiny.byte_level, "metaspace": tiny.metaspace, "byte-fallback": tiny.byte_fallback}
PADDING = 7
"""Columns of a target's logits, and of a control's, that are no tokens."""


class Random(Model):
    """A model of random logits, the same ones for the same tokens."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.network = dataclasses.make_dataclass("Network", ["config"])(
            tiny.llama(len(tokenizer) + PADDING, width=64)
        )

    def logits(self, tokens: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
        return 3 * torch.randn(self.network.config.vocab_size, generator=generator)


@cache
def reference_of(
    target: tuple[str, int, int], control: tuple[str, int, int], routing: type[PathReference] = PathReference
) -> PathReference:
    models = (Random(MAKERS[kind](size, seed)) for kind, size, seed in (target, control))
    return routing(*models)


@cache
def table_of(reference: PathReference):
    models = (reference.target, reference.control)
    return build_table(*(ByteEncoder(model.tokenizer, read_vocabulary(model.tokenizer)) for model in models))


def routing_of(table, width, name="path", **options):
    return ROUTINGS[name](Pair(table, width, **options))


def routed(reference, routing, contexts, strengths, logits, *, pending=()):
    """What `routing` makes of the reference's models, for the row of logits with the context's own number."""
    rows = torch.stack([reference.control.logits(context) for context in contexts])
    lookahead, ahead = routing.lookahead(rows), None
    if lookahead is not None:
        assert lookahead.tokens.shape[1] == routing.longest
        ahead = torch.stack([reference.control.logits(context) for context in lookahead.after(contexts)])
    shift = routing.shift(rows, torch.tensor(strengths), lookahead, ahead, pending)
    assert shift.finite.all()
    return shift.resolve(logits, torch.arange(len(contexts)))


def node_of(routing, pieces):
    node = ROOT
    for piece in pieces:
        node = routing.children[node, piece]
    return node


def vocabularies(*kinds):
    return st.tuples(st.sampled_from(kinds), st.sampled_from([330, 420, 600, 900]), st.sampled_from([0, 1]))


@pytest.mark.parametrize("kind", [PathReference, PiecesReference], ids=["path", "pieces"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(target=vocabularies("byte-level", "metaspace"), control=vocabularies(*MAKERS), data=st.data())
def test_the_shift_is_that_of_the_formula(kind, target, control, data):
    """Over vocabularies of every kind, whichever is finer; for masked tokens and negative strengths too."""
    reference, pieces = reference_of(target, control, kind), kind is PiecesReference
    contexts = data.draw(
        st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1, max_size=4), "contexts"
    )
    strengths = [data.draw(st.sampled_from([1.0, 0.5, -1.0, 2.5])) for _ in contexts]
    width = reference.target.network.config.vocab_size
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    logits = 4 * torch.randn(len(contexts), width, generator=generator)
    logits += data.draw(st.sampled_from([0, 300, -300]), "constant")
    masked = torch.rand(logits.shape, generator=generator) < data.draw(
        st.sampled_from([0, 0.3, 0.99]), "masked"
    )
    masked[:, 0] = False  # of a row without any logits there are no shares
    logits[masked] = -torch.inf
    table = table_of(reference)
    neutral = data.draw(st.booleans(), "neutral")
    waits = data.draw(st.booleans(), "waits")
    routing = routing_of(table, width, "pieces" if pieces else "path", neutral=neutral, waits=waits)
    reference.neutral = neutral
    own = reference.own if pieces else ()
    spelled = [(), *(node for node in own if reference.pending([*node])[0])]
    begun = [data.draw(st.sampled_from(spelled), "pending") for _ in contexts]
    before = [reference.control.logits([7, *context]) for context in contexts]
    pending = [
        PendingSpelling(place, node_of(routing, node), before[place])
        for place, node in enumerate(begun)
        if node
    ]
    found = routed(reference, routing, contexts, strengths, logits, pending=pending)
    for place, (context, strength, row) in enumerate(zip(contexts, strengths, logits, strict=True)):
        expected = reference.shift(context, strength, row)
        if begun[place]:
            expected = reference.resumed(begun[place], strength * before[place], expected, row)
        torch.testing.assert_close(found[place], expected, atol=2e-4, rtol=1e-4)


FINE, COARSE = ("byte-level", 330, 0), ("byte-level", 900, 0)


def test_an_expanded_node_decides_between_its_tokens_alone():
    """The tokens that share the first piece are together as likely as without; the node was expanded."""
    reference = reference_of(COARSE, FINE)
    table = table_of(reference)
    width = reference.target.network.config.vocab_size
    routing = routing_of(table, width)
    logits, contexts = torch.randn(1, width), [[5, 6, 7]]
    rows = torch.stack([reference.control.logits(context) for context in contexts])
    without = (logits + 1.5 * routing.first.routed(rows)).softmax(dim=1)[0]
    found = (logits + routed(reference, routing, contexts, [1.5], logits)).softmax(dim=1)[0]
    firsts = torch.tensor([reference.spellings.get(token, [0])[0] for token in range(width)])
    sums = [torch.zeros(len(rows[0])).index_add(0, firsts, shares) for shares in (without, found)]
    torch.testing.assert_close(*sums)
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["path", "pieces"])
def test_a_control_beside_its_own_template_is_routed_as_by_pm_mined(name):
    """Nothing is spelled in pieces, so that nothing is looked ahead at, and nothing is ever pending."""
    reference = reference_of(FINE, FINE)
    table = table_of(reference)
    width = reference.target.network.config.vocab_size
    routing = routing_of(table, width, name)
    rows, logits, strengths = torch.randn(2, width), torch.randn(2, width), torch.tensor([1.0, -0.5])
    assert (routing.longest, routing.children, routing.lookahead(rows)) == (0, {}, None)
    found, expected = (
        each.shift(rows, strengths, None, None).resolve(logits, torch.tensor([0, 1]))
        for each in (routing, routing_of(table, width, "pm-mined"))
    )
    assert torch.equal(found, expected)


def test_the_worked_example_of_the_docs():
    """docs/path_routing.md: `Sure`, which the control spells `S|ure`, among tokens that begin like it."""
    target = hand_made.encoder(
        [*"Sureta", "Su", "re", "Sure", "te", "tea"],
        [("S", "u"), ("r", "e"), ("Su", "re"), ("t", "e"), ("te", "a")],
    )
    control = hand_made.encoder([*"Sureta", "ur", "ure"], [("u", "r"), ("ur", "e")])
    table = build_table(target, control)
    ids, own = target.vocabulary.ids, control.vocabulary.ids
    shares = {b"S": 0.05, b"Su": 0.03, b"Sure": 0.02, b"tea": 0.9}
    logits = torch.full((1, len(ids)), -torch.inf)
    for token, share in shares.items():
        logits[0, ids[token]] = log(share)
    first, second = torch.zeros(1, len(own)), torch.zeros(1, len(own))
    first[0, own[b"S"]] = log(8)
    second[0, own[b"ure"]] = log(16)

    def shares_under(routing):
        shift = routing.shift(first, torch.ones(1), routing.lookahead(first), second)
        found = (logits + shift.resolve(logits, torch.tensor([0]))).softmax(dim=1)[0]
        return {token: round(float(found[ids[token]]), 3) for token in shares}

    assert shares_under(routing_of(table, len(ids), "pm-mined")) == {
        b"S": 0.235,
        b"Su": 0.141,
        b"Sure": 0.094,
        b"tea": 0.529,
    }
    path = routing_of(table, len(ids))
    assert shares_under(path) == {b"S": 0.059, b"Su": 0.035, b"Sure": 0.376, b"tea": 0.529}
    assert path.lookahead(first).after([[1, 2]]) == [[1, 2, own[b"S"]]]


def test_a_shift_can_be_asked_for_twice():
    """The second answer is the first."""
    reference = reference_of(COARSE, FINE)
    width = reference.target.network.config.vocab_size
    routing = routing_of(table_of(reference), width)
    rows, ahead, logits = (torch.randn(3, width) for _ in range(3))
    shift = routing.shift(rows, torch.ones(3), routing.lookahead(rows), ahead)
    first = shift.resolve(logits, torch.tensor([0, 2, 1])).clone()
    assert not torch.equal(shift.resolve(logits, torch.tensor([0, 1, 2])), first)
    assert torch.equal(shift.resolve(logits, torch.tensor([0, 2, 1])), first)


@pytest.mark.parametrize("broken", [0, 1], ids=["the row", "the row ahead"])
def test_a_request_of_which_something_is_not_finite_is_left_alone(broken):
    """And no other."""
    reference = reference_of(COARSE, FINE)
    width = reference.target.network.config.vocab_size
    routing = routing_of(table_of(reference), width)
    rows, logits, ahead = torch.randn(2, width), torch.randn(2, width), torch.randn(2, width)
    (rows, ahead)[broken][1] = torch.nan
    shift = routing.shift(rows, torch.ones(2), routing.lookahead(rows), ahead)
    assert shift.finite.tolist() == [True, False]
    values = shift.resolve(logits, torch.tensor([0, 1]))
    assert values[0].isfinite().all()
    assert values[0].any()
    assert not values[1].any()


def test_a_row_without_anything_likely_looks_ahead_at_nothing():
    """Whatever is handed back for it, it gets the shift of first tokens."""
    reference = reference_of(COARSE, FINE)
    table, width = table_of(reference), reference.target.network.config.vocab_size
    routing = routing_of(table, width)
    rows = torch.randn(2, width)
    rows[1] = -torch.inf
    rows[1, 0] = 1.0
    lookahead = routing.lookahead(rows)
    assert lookahead.after([[7], [8]]) == [[7, *lookahead.tokens[0][: lookahead.lengths[0]].tolist()], [8]]


def test_nodes_whose_tokens_have_no_logits_are_not_expanded():
    """A tokenizer may know more tokens than the model has logits."""
    reference = reference_of(COARSE, FINE)
    table = table_of(reference)
    width = 600
    routing = routing_of(table, width)
    rows = torch.randn(1, reference.control.network.config.vocab_size)
    shift = routing.shift(rows, torch.ones(1), routing.lookahead(rows), rows)
    assert shift.resolve(torch.randn(1, width), torch.tensor([0])).shape == (1, width)


def test_a_spelling_that_is_longer_than_the_limit_is_not_followed():
    """So that there is room for it in every window."""
    reference = reference_of(("metaspace", 900, 0), FINE)
    table = table_of(reference)
    longest = max(len(node) for node in reference.nodes if not reference.above(node))
    assert longest > 1
    assert [routing_of(table, 907, longest=limit).longest for limit in (0, 1, 16)] == [0, 1, longest]


def test_the_shifts_along_a_spelling_are_that_of_the_whole_token():
    """Whatever the control tokens beside it get: what is added at its pieces, one step after the other."""
    reference = reference_of(FINE, COARSE, PiecesReference)
    width = reference.target.network.config.vocab_size
    routing = routing_of(table_of(reference), width, "pieces")
    spelling = next(node for node in reference.own if len(node) == 3 and not reference.pending([*node])[0])
    (whole,) = reference.own[spelling]
    row, later = (reference.control.logits(context) for context in ([1], [2]))

    def shift(row, pending=()):
        routed = routing.shift(row[None], torch.ones(1), routing.lookahead(row[None]), row[None], pending)
        return routed.resolve(torch.randn(1, width), torch.tensor([0]))[0]

    first = shift(row)[spelling[0]]
    others = [
        shift(later, [PendingSpelling(0, node_of(routing, spelling[:length]), row)])[spelling[length]]
        for length in (1, 2)
    ]
    torch.testing.assert_close(first + sum(others), row[whole], atol=1e-4, rtol=1e-4)
