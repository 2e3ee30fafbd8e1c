"""Answers of a teacher behind a server, in the template's tokens."""

from __future__ import annotations

import math

import pytest
import torch

import hand_made
from trimtab_mappings import load_tokenizer
from trimtab_training.control.examples import ExampleEncoder
from trimtab_training.control.formats import DataError, Record
from trimtab_training.control.taught import Scored, TaughtEncoder, TeacherTokens

TOKENS = [*"Sureyo", "m", "Su", "re", "Sure", "</s>"]
MERGES = [("S", "u"), ("r", "e"), ("Su", "re")]
RECORD = Record("q.jsonl, record 3", ({"role": "user", "content": "Bada?"},))


@pytest.fixture
def tokens() -> TeacherTokens:
    return TeacherTokens(hand_made.encoder(TOKENS, MERGES))


def scored(*pieces: str, log_prob: float = -0.5) -> list[Scored]:
    return [Scored(piece.encode(), log_prob, ((piece.encode(), log_prob),)) for piece in pieces]


def names(found) -> list[str]:
    return [TOKENS[token] for token in found[0]]


def test_tokens_are_found_by_their_bytes_and_special_ones_by_their_text(tokens):
    assert names(tokens.find(scored("Sure", "m", "e", "</s>"), is_cut=False)) == ["Sure", "m", "e", "</s>"]


@pytest.mark.parametrize("pieces", [("Su", "re"), ("S", "ure"), ("Sure", "x")])
def test_an_answer_in_other_tokens_is_not_found(tokens, pieces):
    """The template says `Sure` as one; `ure` and `x` are no tokens of it."""
    assert tokens.find(scored(*pieces), is_cut=False) is None


def test_a_word_that_the_limit_cut_is_left_out_if_its_part_has_other_tokens(tokens):
    words = scored("m", "e", " S", "u")
    assert tokens.find(words, is_cut=False) is None
    ids, top = tokens.find(words, is_cut=True)
    assert [TOKENS[token] for token in ids] == ["m", "e"]
    assert len(top.ids) == 2
    assert tokens.find(scored("S", "ure"), is_cut=True) is None


def test_the_bytes_of_a_character_may_all_be_at_its_last_token():
    """As vLLM writes them."""
    of_bytes = TeacherTokens(hand_made.encoder(["m", "ð", "Ł", "Ļ", "Ĥ"]))
    pieces = ["", "", "", "🙂", "m"]
    apart = [Scored(piece.encode(), -0.1 * place) for place, piece in enumerate(pieces)]
    ids, top = of_bytes.find(apart, is_cut=False)
    assert ids == [1, 2, 3, 4, 0]
    assert top.log_probs[:, 0].tolist() == pytest.approx([0, -0.1, -0.2, -0.3, -0.4])


def test_distributions_keep_what_the_server_gave_and_spread_the_rest(tokens):
    """A token that the template lacks is in the rest."""
    top = ((b"Su", math.log(0.2)), (b"m", math.log(0.5)), (b"xy", math.log(0.1)), (b"</s>", math.log(0.05)))
    answer = [Scored(b"m", math.log(0.5), top), Scored(b"e", 0.0, ((b"e", 0.0),))]
    _, found = tokens.find(answer, is_cut=False)
    dense = found.dense(20).exp()
    torch.testing.assert_close(dense.sum(dim=1), torch.ones(2))
    expected = torch.full((20,), 0.25 / 17)
    for token, probability in (("Su", 0.2), ("m", 0.5), ("</s>", 0.05)):
        expected[TOKENS.index(token)] = probability
    torch.testing.assert_close(dense[0], expected)
    assert dense[1, TOKENS.index("e")] == pytest.approx(1)
    assert found.dense(20).isfinite().all()


@pytest.fixture
def encoder(template) -> ExampleEncoder:
    return ExampleEncoder(load_tokenizer(str(template)), 64)


def choice(content: str, reason: str = "stop", logprobs: object = None) -> dict:
    return {"message": {"content": content}, "finish_reason": reason, "logprobs": logprobs}


def test_what_a_teacher_said_is_learned_with_its_end(encoder, template):
    """Earlier turns are not."""
    turns = [("user", "Bada?"), ("assistant", "No."), ("user", "Cefi?")]
    record = Record("q", tuple({"role": role, "content": text} for role, text in turns))
    view = TaughtEncoder(encoder).said(record, choice("Yes, and more.")).view
    tokenizer = load_tokenizer(str(template))
    assert tokenizer.decode(view.targets) == "Yes, and more.</s>"
    assert view.ids[: view.positions[0]] == encoder.question(record)


def test_the_end_of_an_answer_that_was_cut_is_not_learned(encoder, template):
    view = TaughtEncoder(encoder).said(RECORD, choice("Yes, an", "length")).view
    assert load_tokenizer(str(template)).decode(view.targets) == "Yes, an"


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "q.jsonl, record 3: the teacher's server gave no `logprobs` with `top_logprobs`"),
        ({"content": [{"token": "a", "logprob": 0, "top_logprobs": []}]}, "gave no `logprobs` with"),
        ({"content": []}, "q.jsonl, record 3: the teacher's answer is empty"),
        (
            {"content": [{"token": "ŷŷ", "logprob": 0, "top_logprobs": [{"token": "ŷŷ", "logprob": 0}]}]},
            "q.jsonl, record 3: the teacher's answer 'ŷŷ' is not in the tokens that the template's tokenizer",
        ),
    ],
)
def test_an_answer_without_its_distributions_is_refused(encoder, logprobs, message):
    with pytest.raises(DataError) as caught:
        TaughtEncoder(encoder).distributions(RECORD, (1, 2), choice("a", logprobs=logprobs))
    assert message in str(caught.value)


def test_an_empty_answer_is_refused(encoder):
    with pytest.raises(DataError, match="record 3: the teacher's answer is empty"):
        TaughtEncoder(encoder).said(RECORD, choice(""))
