"""The model `trimtab` of lm-evaluation-harness, held against the slow reference."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from trimtab_training.evaluation.control import Setting
from trimtab_training.evaluation.lm_eval_adapter import ControlledLM
from trimtab_training.evaluation.reference import SlowReference

CHAT = [{"role": "user", "content": "Bako?"}]


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    tables = str(tmp_path_factory.mktemp("tables"))
    return ControlledLM(str(family.b), str(family.control), strength=1.5, tables=tables)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def expected(family, tmp_path, model, pair, own=None):
    """The log-likelihood from the definition."""
    context, continuation = pair
    target = model._target
    slow = SlowReference(target, str(family.control), tmp_path)
    prompt, answer = target.tokenizer(context).input_ids, target.tokenizer(continuation).input_ids
    assert target.tokenizer(context + continuation).input_ids == [*prompt, *answer]
    own = own or model._control._tokenizer(context).input_ids
    rows = slow.logits(prompt, own, answer, Setting(1.5, "path"))
    return sum(float(row.log_softmax(dim=0)[token]) for row, token in zip(rows, answer, strict=True))


def test_it_is_registered():
    assert get_model("trimtab") is ControlledLM


def test_log_likelihoods(family, tmp_path, model):
    pairs = [("Bako litu", " mavo dera"), ("Zolo", " x=1")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (log_likelihood, is_greedy), pair in zip(found, pairs, strict=True):
        assert log_likelihood == pytest.approx(expected(family, tmp_path, model, pair), abs=1e-3)
        assert is_greedy is False


def test_what_is_generated_is_greedy(model):
    options = {"until": ["\n"], "max_gen_toks": 5}
    (text,) = model.generate_until([request("generate_until", "Bako litu", options)])
    (tokens,) = model.generate_until([request("generate_until", "Bako litu", {"max_gen_toks": 1})])
    assert text.startswith(tokens)


def test_samples_are_refused(model):
    with pytest.raises(ValueError, match="generates greedily"):
        model.generate_until([request("generate_until", "x", {"do_sample": True, "temperature": 1.0})])


def test_an_empty_context(model):
    ((log_likelihood, _),) = model.loglikelihood([request("loglikelihood", "", "Bako")])
    assert log_likelihood < 0


def test_texts_longer_than_the_window(model):
    (short, long) = model.loglikelihood_rolling(
        [request("loglikelihood_rolling", text) for text in ("Bako litu", "Bako litu dera. " * 60)]
    )
    assert long < 20 * short < 0


def test_a_conversation_reaches_the_control_in_its_own_template(family, tmp_path):
    chatting = ControlledLM(str(family.b), str(family.control), strength=1.5, tables=str(tmp_path))
    text = chatting.apply_chat_template(CHAT)
    ((log_likelihood, _),) = chatting.loglikelihood([request("loglikelihood", text, "zolo")])
    own = chatting._control.encode(CHAT)
    assert own != chatting._control._tokenizer(text).input_ids
    assert log_likelihood == pytest.approx(
        expected(family, tmp_path, chatting, (text, "zolo"), own), abs=1e-3
    )


def test_without_control_it_is_the_target(family):
    plain = ControlledLM(str(family.b))
    ((log_likelihood, _),) = plain.loglikelihood([request("loglikelihood", "Bako", " litu")])
    assert log_likelihood < 0
