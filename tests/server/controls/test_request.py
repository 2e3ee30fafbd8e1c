"""`control` for clients that add no field: a header, or a name behind the model's."""

from __future__ import annotations

import json

import pytest

from trimtab_processors.parameters import parse_xargs

HEADER = "x-trimtab-control"
MESSAGES = [{"role": "user", "content": "hi there"}]


def applied(gateway, model, header=None, **body):
    headers = {} if header is None else {HEADER: header}
    response = gateway.client.post(
        "/v1/chat/completions", json={"model": model, "messages": MESSAGES, **body}, headers=headers
    )
    assert response.status_code == 200, response.text
    base = model.partition(":")[0]
    told = parse_xargs(gateway.last(base).get("vllm_xargs"))
    said = response.headers[HEADER]
    assert said == ",".join(
        f"{each.control}={each.strength}"
        + "".join(
            f";{option}={value}"
            for option in ("top_k", "min_p", "until", "routing")
            if (value := getattr(each, option)) is not None
        )
        for each in told
    ) or (said, told) == ("off", ())
    assert gateway.last(base)["model"] == base
    return said


@pytest.mark.parametrize(
    ("said", "is_applied"),
    [
        ("one", "one=0.5"),
        ("one=0.7", "one=0.7"),
        ("one=-2", "one=-2.0"),
        ("one=1e-1", "one=0.1"),
        ("one;top_k=5", "one=0.5;top_k=5"),
        ("one;routing=path", "one=0.5;routing=path"),
        ("one;until=20;min_p=1e-1", "one=0.5;min_p=0.1;until=20"),
        ("one;min_p=1,two;until=3", "one=0.5;min_p=1.0,two=0.5;until=3"),
        ("one=1;routing=pm-mined;top_k=5,two", "one=1.0;top_k=5;routing=pm-mined,two=0.5"),
        ("one=1; routing=path", "one=1.0;routing=path"),
        (" one = 1", None),
        ("one=0.7,two", "one=0.7,two=0.5"),
        ("one=0.7;top_k=9, two=-1", "one=0.7;top_k=9,two=-1.0"),
        ("off", "off"),
    ],
)
@pytest.mark.parametrize("way", ["header", "alias"])
def test_a_header_and_an_alias_say_the_same(two_models, way, said, is_applied):
    """What an answer says of what was applied may be said again."""
    model, header = ("plain", said) if way == "header" else (f"plain:{said}", None)
    if is_applied is None:
        response = two_models.client.post(
            "/v1/chat/completions",
            json={"model": model, "messages": MESSAGES},
            headers={HEADER: header} if header else {},
        )
        assert response.status_code == 400
    else:
        assert applied(two_models, model, header) == is_applied
        assert applied(two_models, "plain", is_applied) == is_applied


def test_on_is_the_default(two_models):
    assert applied(two_models, "steered", "on") == "one=0.5"
    assert applied(two_models, "steered:on") == "one=0.5"


def test_the_body_goes_before_the_header_that_before_the_alias_and_that_before_the_default(two_models):
    assert applied(two_models, "steered:one=3", "one=2", control={"name": "one", "strength": 1}) == "one=1.0"
    assert applied(two_models, "steered:one=3", "one=2") == "one=2.0"
    assert applied(two_models, "steered:one=3") == "one=3.0"
    assert applied(two_models, "steered") == "one=0.5"
    assert applied(two_models, "steered:one=3", "one=2", control=False) == "off"
    assert applied(two_models, "steered:one=3", "off") == "off"
    assert applied(two_models, "steered:off") == "off"
    assert applied(two_models, "steered:off", control=None) == "off"


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("", "'' is not a name"),
        ("nobody", "it has: one, two"),
        ("one=", "'one=' is not a name"),
        ("one=x", "'x' is not a number; write it as in JSON"),
        ("one=1_0", "'1_0' is not a number"),
        ("one=+1", "'+1' is not a number"),
        ("one=.5", "'.5' is not a number"),
        ("one=1.", "'1.' is not a number"),
        ("one=01", "'01' is not a number"),
        ("one=0x1", "'0x1' is not a number"),
        ("one=inf", "'inf' is not a number"),
        ("one=" + "9" * 500, "is not a number"),
        ("one=1e999", "finite"),
        ("one;top_k=1_0", "'1_0' is not an integer"),
        ("one;top_k=+1", "'+1' is not an integer"),
        ("one;top_k=1.0", "'1.0' is not an integer"),
        ("one;top_k=" + "9" * 500, "is not an integer"),
        ("one=nan", "'nan' is not a number"),
        ("one=11", "less than or equal to 10"),
        ("one;top_k=0", "greater than or equal to 1"),
        ("one;top_k=x", "'x' is not an integer"),
        ("one;routing=best", "should be 'pm-mined', 'path' or 'pieces', got 'best'"),
        ("one;routing=path-4x4", "should be 'pm-mined', 'path' or 'pieces', got 'path-4x4'"),
        ("one;min_p=.1", "'.1' is not a number"),
        ("one;min_p=2", "less than or equal to 1"),
        ("one;until=0", "greater than or equal to 1"),
        ("one;until=1.5", "'1.5' is not an integer"),
        ("one;top_k=1;top_k=2", "an option stands twice"),
        ("one;strength=2", "'one;strength=2' is not a name"),
        ("one,,two", "'' is not a name"),
        ("one,one", "stands twice"),
        ("one," * 50, "51 controls, more than 8"),
        ("one=1=2", "'one=1=2' is not a name"),
        ("off,one", "no control 'off'"),
        ("\xf8", "no control '\xc3\xb8'"),
    ],
)
def test_what_can_not_be_understood_is_refused_with_its_place(two_models, said, part):
    for model, headers, param in (
        ("plain", {HEADER: said.encode()}, HEADER),
        (f"plain:{said.encode().decode('latin-1')}", {}, "model"),
    ):
        response = two_models.client.post(
            "/v1/chat/completions", json={"model": model, "messages": MESSAGES}, headers=headers
        )
        assert response.status_code == 400
        error = two_models.error(response)
        assert part in error["message"]
        assert error["param"].startswith(param)
    assert two_models.asked("plain") == []


@pytest.mark.parametrize("said", ["one=\u0661", "one=\uff11", "one=1e\u00b2", "one;top_k=\u0663"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_digits_of_other_scripts_are_no_numbers_in_an_alias(two_models, said, path):
    response = two_models.chat(path=path, model=f"plain:{said}")
    assert (response.status_code, two_models.error(response)["param"]) == (400, "model")
    assert "write it as in JSON" in two_models.error(response)["message"]


@pytest.mark.parametrize("said", ["nobody", "one=x", "one=11", "one,one", "on", ""])
def test_a_bad_alias_is_refused_by_endpoints_that_take_no_control_too(two_models, said):
    model = f"plain:{said}"
    answers = [
        two_models.client.post("/tokenize", json={"model": model, "prompt": "x"}),
        two_models.client.post("/v1/embeddings", json={"model": model, "input": "x"}),
        two_models.client.post("/v1/audio/transcriptions", files={"file": b"x"}, data={"model": model}),
        two_models.client.get("/version", params={"model": model}),
    ]
    for response in answers:
        assert response.status_code == 400
        assert two_models.error(response)["param"].startswith("model")


def test_an_error_names_the_place_where_the_control_was_asked_for(two_models):
    for field, headers, model, param in (
        ({"control": "nobody"}, {HEADER: "two"}, "steered:nobody", "control"),
        ({}, {HEADER: "nobody"}, "steered:one", HEADER),
        ({}, {}, "steered:nobody", "model"),
        ({"control": True}, {}, "plain", "control"),
        ({}, {HEADER: "on"}, "plain", HEADER),
        ({}, {}, "plain:on", "model"),
        ({}, {HEADER: "one,one"}, "plain", HEADER),
    ):
        response = two_models.client.post(
            "/v1/chat/completions", json={"model": model, "messages": MESSAGES, **field}, headers=headers
        )
        assert (response.status_code, two_models.error(response)["param"]) == (400, param)


def test_two_headers_are_one_list(two_models):
    response = two_models.client.post(
        "/v1/chat/completions",
        json={"model": "plain", "messages": MESSAGES},
        headers=[(HEADER, "one=1"), (HEADER, "two")],
    )
    assert response.headers[HEADER] == "one=1.0,two=0.5"


def test_the_header_is_the_gateways_business_alone(two_models):
    applied(two_models, "plain", "one")
    assert HEADER not in {name.lower() for name in two_models.asked("plain")[-1]["headers"]}


def test_streams_say_what_was_applied_too(two_models):
    body = {"model": "plain:one=0.7", "messages": MESSAGES, "stream": True}
    with two_models.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers[HEADER] == "one=0.7"


def test_other_endpoints_take_the_alias_for_its_model(two_models):
    seen = two_models.client.post("/tokenize", json={"model": "plain:one", "prompt": "x"})
    assert seen.headers["x-from-worker"] == "plain"
    assert json.loads(seen.json()["body"]) == {"model": "plain", "prompt": "x"}
    assert two_models.client.get("/version?model=plain:one").headers["x-from-worker"] == "plain"


def test_models_are_listed_with_their_aliases_as_adapters_are(two_models):
    listed = two_models.client.get("/v1/models").json()["data"]
    assert {card["id"]: card.get("parent") for card in listed} == {
        "plain": None,
        "steered": None,
        "plain:one": "plain",
        "plain:two": "plain",
        "steered:one": "steered",
    }
    assert {card["object"] for card in listed} == {"model"}


def test_no_more_aliases_are_listed_than_may_be(start, pack):
    gateway = start(controls={"one": str(pack), "two": str(pack)}, limits={"aliases": 1})
    assert [card["id"] for card in gateway.client.get("/v1/models").json()["data"]] == ["m", "m:one"]
    assert applied(gateway, "m:two") == "two=0.5"


def test_an_alias_is_described_as_its_model_is(two_models):
    card = two_models.client.get("/v1/models/plain:one=0.7").json()
    assert (card["id"], card["parent"], card["max_model_len"]) == ("plain:one=0.7", "plain", 256)
    assert two_models.client.get("/v1/models/plain:nobody").status_code == 400
    assert two_models.client.get("/v1/models/nobody:one").status_code == 404
