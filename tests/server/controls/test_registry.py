"""`control` in a request's body: what is applied, what the replica is told, what is refused."""

from __future__ import annotations

import json

import pytest

from fake_vllm import MAPPING
from trimtab_mappings import load_tokenizer
from trimtab_processors.parameters import parse_xargs

HEADER = "x-trimtab-control"


def told(gateway, model):
    """What the plugin would read from the last request of its only control, if any."""
    return next(iter(parse_xargs(gateway.last(model).get("vllm_xargs"))), None)


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


def test_a_routing_reaches_the_plugin_and_is_said(two_models):
    response = two_models.chat(model="steered", control={"name": "one", "routing": "path"})
    assert response.headers[HEADER] == "one=0.5;routing=path"
    assert told(two_models, "steered").routing == "path"


def test_a_routing_that_the_models_runner_lacks_is_refused(start, pack):
    gateway = start(controls={"one": str(pack)}, models={"m": {"model": ".", "runner": "v2"}})
    response = gateway.chat(control={"name": "one", "routing": "pieces"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "control")
    assert "V2 model runner has only the routings" in response.json()["error"]["message"]
    for routing in ("pm-mined", "path"):
        assert gateway.chat(control={"name": "one", "routing": routing}).status_code == 200


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
        ("off", "control", "turns control off by `control: false`"),
        ("on", "control", "turns control on by `control: true`"),
        (["one", "off"], "control.1", "`control: false`"),
        ({"name": "on", "strength": 1}, "control", "`control: true`"),
        (1, "control", "got 1"),
        (0.5, "control", "got 0.5"),
        ([["one"]], "control.0", "got ['one']"),
        (["one", 3], "control.1", "got 3"),
        (["one", {"name": "one"}], "control", "'one' stands twice"),
        (["one"] * 5, "control", "5 controls, more than the 4"),
        (["one"] * 999, "control", "999 controls, more than 8"),
        (["one", {"name": "one", "strength": "x"}], "control.1.strength", "valid number"),
        ({}, "control.name", "Field required"),
        ({"strength": 1}, "control.name", "Field required"),
        ({"name": None}, "control.name", "valid string"),
        ({"name": "two"}, "control", "no control 'two'"),
        ({"name": "one", "top_k": 0}, "control.top_k", "greater than or equal to 1, got 0"),
        ({"name": "one", "min_p": 0}, "control.min_p", "greater than 0, got 0"),
        ({"name": "one", "min_p": 1.5}, "control.min_p", "less than or equal to 1, got 1.5"),
        ({"name": "one", "until": 0}, "control.until", "greater than or equal to 1, got 0"),
        ({"name": "one", "until": 2.5}, "control.until", "valid integer, got 2.5"),
        (
            {"name": "one", "topk": 5},
            "control.topk",
            "unknown key; a control has: name, strength, top_k, min_p, until, routing",
        ),
        (
            {"name": "one", "routing": "straight"},
            "control.routing",
            "should be 'pm-mined', 'path' or 'pieces', got 'straight'",
        ),
        ({"name": "one", "strength": 10.01}, "control.strength", "less than or equal to 10"),
        ({"name": "one", "strength": -11}, "control.strength", "greater than or equal to -10"),
        ({"name": "one", "strength": "1"}, "control.strength", "valid number, got '1'"),
        ({"name": "one", "strength": True}, "control.strength", "valid number"),
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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_refused_wherever_it_stands(two_models, number):
    response = two_models.post(f'{{"model": "plain", "messages": [], "temperature": {number}}}')
    assert response.status_code == 400
    assert f"{number} is no number in JSON" in two_models.error(response)["message"]


@pytest.mark.parametrize("text", [r"\ud800", r"a\uDFFFb", r"\udc00\ud800"])
@pytest.mark.parametrize("body", ['{"model": "%s"}', '{"%s": 1}', '{"model": "plain", "control": "%s"}'])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(two_models, body, text):
    response = two_models.post(body % text)
    assert (response.status_code, two_models.error(response)["code"]) == (400, "invalid_json")


def test_true_is_refused_where_it_could_mean_several(two_models):
    response = two_models.chat(model="plain", control=True)
    assert response.status_code == 400
    assert "Available controls: one, two" in two_models.error(response)["message"]


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


TURNS = [{"role": "user", "content": [{"type": "input_text", "text": "hi there"}]}]


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/v1/responses", {"input": "x"}, "user says x."),
        ("/v1/responses", {"input": TURNS, "instructions": "Be."}, "system says Be.. user says hi there."),
        ("/v1/responses", {"input": [{"type": "reasoning"}, *TURNS]}, "user says hi there."),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, None),
        ("/v1/messages", {"messages": TURNS, "max_tokens": 9}, "user says hi there."),
        (
            "/v1/messages",
            {"system": [{"type": "text", "text": "Be."}], "messages": TURNS},
            "system says Be.. user says hi there.",
        ),
    ],
)
def test_every_endpoint_with_a_conversation_gives_the_control_its_own_prompt(
    two_models, pack, path, body, read
):
    """But where some of it stands only in the replica's memory."""
    response = two_models.client.post(path, json={"model": "plain", "control": "two", **body})
    assert response.headers[HEADER] == "two=0.5"
    prompt = told(two_models, "plain").prompt
    if read is None:
        assert prompt is None
    else:
        assert load_tokenizer(str(pack)).decode(prompt) == f"{read} Then:"


def test_a_prompt_of_the_controls_that_is_too_long_is_refused(start, pack):
    gateway = start(controls={"one": str(pack)}, limits={"control_prompt_tokens": 9})
    response = gateway.chat(model="m", control="one")
    error = gateway.error(response)
    assert (response.status_code, error["param"], error["code"]) == (413, "messages", "prompt_too_long")
    assert gateway.chat(model="m").status_code == 200


def test_the_shifts_of_a_list_are_summed_each_at_its_strength(two_models):
    wanted = ["one", {"name": "two", "strength": -1, "top_k": 5}]
    response = two_models.chat(model="plain", control=wanted)
    assert response.headers[HEADER] == "one=0.5,two=-1.0;top_k=5"
    first, second = parse_xargs(two_models.last("plain")["vllm_xargs"])
    assert (first.control, first.strength, first.top_k) == ("one", 0.5, None)
    assert (second.control, second.strength, second.top_k) == ("two", -1.0, 5)
    assert first.prompt == second.prompt != ()


def test_an_empty_list_is_off(two_models):
    assert two_models.chat(model="steered", control=[]).headers[HEADER] == "off"


def test_everything_else_in_the_body_survives(start, bare_pack):
    gateway = start(controls={"bare": str(bare_pack)})
    body = (
        '{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude00 pair, \\u00e9"}],"control":"bare",'
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
        "loaded": False,
        "models": ["plain", "steered"],
        "default_for": ["steered"],
        "mappings": dict.fromkeys(("plain", "steered"), MAPPING),
    }
