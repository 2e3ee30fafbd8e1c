"""`control` in a request's body: what is applied, what the worker is told, what is refused."""

from __future__ import annotations

import json

import pytest

from trimtab_mappings import load_tokenizer
from trimtab_processors.parameters import parse_xargs

HEADER = "x-trimtab-control"


def told(gateway, model):
    """What the plugin would read from the last request."""
    return parse_xargs(gateway.last(model).get("vllm_xargs"))


def test_without_the_field_and_without_a_default_the_body_is_passed_on_byte_for_byte(start):
    gateway = start()
    body = b'{"model":"m", "messages": [],  "seed":12345678901234567890, "x": 1.10}'
    response = gateway.post(body)
    assert response.status_code == 200
    assert response.headers[HEADER] == "off"
    assert gateway.asked("m")[-1]["headers"]["Content-Length"] == str(len(body))


def test_without_the_field_a_model_applies_its_default_at_the_packs_strength(two_models):
    response = two_models.chat(model="steered")
    assert response.headers[HEADER] == "one=0.5"
    assert told(two_models, "steered").control == "one"
    assert told(two_models, "steered").strength == 0.5


@pytest.mark.parametrize(
    ("wanted", "applied"),
    [
        (None, "one=0.5"),
        (False, "off"),
        (True, "one=0.5"),
        ("one", "one=0.5"),
        ({"name": "one"}, "one=0.5"),
        ({"name": "one", "strength": None}, "one=0.5"),
        ({"name": "one", "strength": 0.7}, "one=0.7"),
        ({"name": "one", "strength": -10}, "one=-10.0"),
        ({"name": "one", "strength": 0}, "one=0.0"),
    ],
)
def test_every_form_of_the_field_is_applied_said_and_taken_out(two_models, wanted, applied):
    response = two_models.chat(model="steered", control=wanted)
    assert response.status_code == 200
    assert response.headers[HEADER] == applied
    assert "control" not in two_models.last("steered")
    parameters = told(two_models, "steered")
    assert applied == ("off" if parameters is None else f"{parameters.control}={parameters.strength}")


def test_a_guard_reaches_the_plugin_and_is_said(two_models):
    response = two_models.chat(model="steered", control={"name": "one", "top_k": 50})
    assert response.headers[HEADER] == "one=0.5;top_k=50"
    assert told(two_models, "steered").top_k == 50


@pytest.mark.parametrize("wanted", [{}, {"control": "one"}])
def test_beam_search_which_no_control_reaches_is_refused_under_one(two_models, wanted):
    body = {"model": "steered", "messages": [], "use_beam_search": True}
    response = two_models.post(json.dumps({**body, **wanted}).encode())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "use_beam_search")
    assert two_models.post(json.dumps({**body, "control": False}).encode()).status_code == 200


def test_true_means_the_only_control_where_there_is_no_default(start, pack):
    gateway = start(controls={"only": str(pack)})
    assert gateway.chat(model="m", control=True).headers[HEADER] == "only=0.5"
    assert gateway.chat(model="m").headers[HEADER] == "off"


@pytest.mark.parametrize(
    ("wanted", "param", "part_of_message"),
    [
        ("true", "control", "no control 'true'"),
        ("two", "control", "it has: one"),
        (1, "control", "got 1"),
        (0.5, "control", "got 0.5"),
        (["one"], "control", "got ['one']"),
        ({}, "control.name", "Field required"),
        ({"strength": 1}, "control.name", "Field required"),
        ({"name": None}, "control.name", "valid string"),
        ({"name": "two"}, "control", "no control 'two'"),
        ({"name": "one", "top_k": 0}, "control.top_k", "greater than or equal to 1, got 0"),
        ({"name": "one", "topk": 5}, "control.topk", "unknown key; a control has: name, strength, top_k"),
        ({"name": "one", "strength": 10.01}, "control.strength", "less than or equal to 10"),
        ({"name": "one", "strength": -11}, "control.strength", "greater than or equal to -10"),
        ({"name": "one", "strength": "1"}, "control.strength", "valid number"),
        ({"name": "one", "strength": True}, "control.strength", "valid number"),
        ({"name": "one", "strength": float("nan")}, "control.strength", "got nan"),
        ({"name": "one", "strength": float("inf")}, "control.strength", "got inf"),
    ],
)
def test_a_malformed_or_unknown_control_is_refused_before_a_worker_sees_it(
    two_models, wanted, param, part_of_message
):
    body = {"model": "steered", "messages": [], "control": wanted}
    response = two_models.post(json.dumps(body))
    assert response.status_code == 400
    error = two_models.error(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert part_of_message in error["message"]
    assert two_models.asked("steered") == []


def test_a_strength_that_overflows_is_refused_as_infinite(two_models):
    body = '{"model": "plain", "messages": [], "control": {"name": "one", "strength": 1e999}}'
    assert two_models.error(two_models.post(body))["param"] == "control.strength"


def test_true_is_refused_where_it_could_mean_several(two_models):
    response = two_models.chat(model="plain", control=True)
    assert response.status_code == 400
    assert "name one of: one, two" in two_models.error(response)["message"]


def test_a_chat_gets_a_prompt_in_the_controls_template_and_tokens(two_models, pack):
    two_models.chat(model="plain", control="one")
    text = load_tokenizer(str(pack)).decode(told(two_models, "plain").prompt)
    assert text == "user says hi there. Then:"


def test_a_raw_prompt_is_left_to_the_plugin(two_models):
    response = two_models.client.post(
        "/v1/completions", json={"model": "plain", "prompt": "hi", "control": "one"}
    )
    assert response.headers[HEADER] == "one=0.5"
    assert told(two_models, "plain").prompt is None


def test_a_control_without_a_chat_template_leaves_the_prompt_to_the_plugin(start, bare_pack):
    gateway = start(controls={"bare": str(bare_pack)})
    assert gateway.chat(model="m", control="bare").headers[HEADER] == "bare=1.0"
    assert told(gateway, "m").prompt is None


def test_the_responses_endpoint_takes_a_control_too(two_models):
    response = two_models.client.post(
        "/v1/responses", json={"model": "plain", "input": "x", "control": "two"}
    )
    assert response.headers[HEADER] == "two=0.5"
    assert told(two_models, "plain").control == "two"


def test_everything_else_in_the_body_survives(start, bare_pack):
    gateway = start(controls={"bare": str(bare_pack)})
    body = (
        '{"model":"m","messages":[{"role":"user","content":"\\ud800 lone, \\u00e9"}],"control":"bare",'
        '"big":123456789012345678901234567890,"small":0.1,"vllm_xargs":{"own":[1,"x"]},"unknown":{"a":null}}'
    )
    assert gateway.post(body).status_code == 200
    seen, sent = gateway.last("m"), json.loads(body)
    assert seen.pop("vllm_xargs")["own"] == sent.pop("vllm_xargs")["own"]
    del sent["control"]
    assert seen == sent


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_keys_of_the_plugin_may_not_be_written_by_a_client(two_models, path):
    body = {"model": "steered", "vllm_xargs": {"x": 1, "trimtab_control": "two"}}
    response = two_models.client.post(path, json=body)
    assert response.status_code == 400
    assert two_models.error(response)["param"] == "vllm_xargs.trimtab_control"
    assert "use the field `control`" in two_models.error(response)["message"]
    assert two_models.asked("steered") == []


def test_xargs_that_are_no_object_are_refused_where_the_control_has_to_join_them(two_models):
    response = two_models.chat(model="plain", control="one", vllm_xargs=["x"])
    assert (response.status_code, two_models.error(response)["param"]) == (400, "vllm_xargs")


def test_xargs_that_are_null_are_none(two_models):
    assert two_models.chat(model="plain", control="one", vllm_xargs=None).status_code == 200
    assert told(two_models, "plain").control == "one"


def test_other_endpoints_refuse_a_control_instead_of_ignoring_it(two_models):
    response = two_models.client.post("/tokenize", json={"model": "plain", "prompt": "x", "control": "one"})
    assert (response.status_code, two_models.error(response)["param"]) == (400, "control")


def test_the_controls_are_listed_with_what_they_are_and_who_offers_them(two_models):
    listed = two_models.client.get("/v1/controls").json()
    assert [control["id"] for control in listed["data"]] == ["one", "two"]
    assert listed["data"][0] == {
        "id": "one",
        "object": "control",
        "description": "keeps secrets",
        "strength": 0.5,
        "training": {"template": "a"},
        "models": ["plain", "steered"],
        "default_for": ["steered"],
    }
