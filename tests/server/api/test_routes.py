"""The gateway's endpoints, and what passes through them."""

from __future__ import annotations

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trimtab_server.engines.replica import State

TWO = {"a": {"model": "."}, "b": {"model": "."}}


# Routing


def test_a_request_goes_to_the_worker_of_its_model(start):
    gateway = start(models=TWO)
    assert gateway.chat(model="b").status_code == 200
    assert [len(gateway.asked(name)) for name in "ab"] == [0, 1]


def test_an_unknown_model_is_404_and_names_those_that_there_are(start):
    gateway = start(models=TWO)
    response = gateway.chat(model="c")
    assert response.status_code == 404
    error = gateway.error(response)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "Available models: a, b" in error["message"]


@pytest.mark.parametrize("model", [{}, {"model": None}])
def test_without_a_model_the_only_one_is_meant(start, model):
    assert start().chat(**model).status_code == 200


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": 3}, {"model": ["a"]}])
def test_without_a_models_name_several_are_an_error(start, model):
    gateway = start(models=TWO)
    response = gateway.chat(**model)
    assert (response.status_code, gateway.error(response)["param"]) == (400, "model")


def test_the_query_names_the_model_where_no_body_does(start):
    gateway = start(models=TWO)
    assert gateway.client.get("/version?model=b").headers["x-from-worker"] == "b"
    response = gateway.client.get("/version")
    assert (response.status_code, gateway.error(response)["param"]) == (400, "model")
    assert (
        "GET /version needs a model. Add ?model=NAME with one of: a, b" in gateway.error(response)["message"]
    )


def test_the_body_names_the_model_of_any_endpoint(start):
    response = start(models=TWO).client.post("/tokenize", json={"model": "b", "prompt": "x"})
    assert response.headers["x-from-worker"] == "b"


# Passing through


def test_method_path_query_and_body_reach_the_worker_as_they_were_written(start):
    body = b'{"model" : "m",\n "n": 1.0}'
    seen = start().post(body, "/v1/responses/of%20mine/cancel?x=%20y&z").json()
    assert seen["method"] == "POST"
    assert seen["target"] == "/v1/responses/of%20mine/cancel?x=%20y&z"
    assert seen["body"].encode() == body


def test_headers_pass_but_those_of_the_hop_and_the_key(start):
    given = {
        "x-session": "7",
        "user-agent": "mine",
        "authorization": "Bearer k",
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "te": "trailers",
    }
    seen = start().client.get("/version", headers=given).json()["headers"]
    assert (seen["x-session"], seen["user-agent"]) == ("7", "mine")
    assert not {"authorization", "x-hop", "te", "content-type"} & set(seen)
    assert seen["host"] == "testserver"


def test_status_and_headers_come_back(start):
    response = start().client.get("/version")
    assert response.status_code == 202
    assert response.headers["x-from-worker"] == "m"
    assert response.headers.get_list("content-type") == ["application/json; charset=utf-8"]


def test_a_stream_comes_back_byte_for_byte(start):
    response = start().chat(stream=True, fake={"tokens": 2})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.content.split(b"\n\n")
    assert len(events) == 4
    assert events[-2:] == [b"data: [DONE]", b""]
    assert response.headers["x-trimtab-control"] == "off"


# Bodies that are refused


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1} x'])
def test_a_body_that_is_no_json_is_400(start, body):
    gateway = start()
    response = gateway.post(body)
    assert (response.status_code, gateway.error(response)["code"]) == (400, "invalid_json")
    assert gateway.asked("m") == []


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_json_that_is_no_object_is_400(start, body, path):
    gateway = start()
    response = gateway.post(body, path)
    assert response.status_code == 400
    assert gateway.error(response)["message"] == "The body must be a JSON object."


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415(start, kind):
    gateway = start()
    response = gateway.post(b'{"model": "m"}', **{"content-type": kind})
    assert (response.status_code, gateway.error(response)["code"]) == (415, "unsupported_media_type")


def test_a_content_type_may_have_parameters(start):
    assert start().post(b"{}", **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize("body", [[b"{}" + b" " * 99], [b"{}", b" " * 60, b" " * 39]])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_over_the_limit_is_413_whether_it_says_so_or_not(start, body, path):
    gateway = start(limits={"body_bytes": 100})
    response = gateway.post(body[0] if len(body) == 1 else iter(body), path)
    assert (response.status_code, gateway.error(response)["code"]) == (413, "body_too_large")


def test_a_body_at_the_limit_passes(start):
    assert start(limits={"body_bytes": 100}).post(b"{}" + b" " * 98).status_code == 200


# ModelPool in trouble


def test_a_worker_that_is_not_up_is_503_with_a_time_to_come_back(start):
    gateway = start()
    gateway.replica("m").state = State.RESTARTING
    for response in (gateway.chat(), gateway.client.get("/version")):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert gateway.error(response)["code"] == "model_not_ready"
        assert "restarting" in gateway.error(response)["message"]


def test_a_worker_that_does_not_listen_is_503(start):
    gateway = start()
    gateway.cut_off("m")
    assert gateway.chat().status_code == 503


def test_a_worker_that_hangs_up_before_its_answer_is_502(start):
    gateway = start()
    response = gateway.chat(fake={"hang_up": "before"})
    assert (response.status_code, gateway.error(response)["code"]) == (502, "worker_failed")


def test_a_worker_that_hangs_up_within_a_stream_ends_it_with_an_error_event(start):
    gateway = start()
    response = gateway.chat(stream=True, fake={"hang_up": "midway"})
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert last.startswith('event: error\ndata: {"error": {"message": "The replica of \'m\' broke off')
    assert end == ""
    assert "[DONE]" not in response.text
    assert 'status="502"' in gateway.client.get("/metrics").text


def test_a_worker_that_falls_silent_is_504(start):
    gateway = start(timeouts={"idle": 0.1})
    response = gateway.chat(fake={"delay": 5})
    assert (response.status_code, gateway.error(response)["code"]) == (504, "worker_timeout")
    assert "0.1 s (timeouts.idle)" in gateway.error(response)["message"]


# The gateway's own endpoints


def test_health_is_the_gateways_and_ready_asks_every_worker(start):
    gateway = start(models=TWO)
    assert gateway.client.get("/health").status_code == 200
    response = gateway.client.get("/ready")
    assert response.status_code == 200
    replica = {"replica": "0", "state": "ready", "reason": None, "restarts": 0}
    expected = {"state": "ready", "restarts": 0, "replicas": [replica]}
    assert response.json()["models"] == dict.fromkeys("ab", expected)


def test_ready_is_503_while_a_worker_is_down_or_does_not_answer(start):
    gateway = start(models={**TWO, "c": {"model": "."}})
    gateway.replica("a").state = State.STARTING
    gateway.cut_off("b")
    response = gateway.client.get("/ready")
    assert response.status_code == 503
    states = {name: model["state"] for name, model in response.json()["models"].items()}
    assert states == {"a": "starting", "b": "unresponsive", "c": "ready"}
    assert gateway.client.get("/health").status_code == 200


def test_models_are_those_of_the_workers_that_answer(start):
    gateway = start(models=TWO)
    assert [m["id"] for m in gateway.client.get("/v1/models").json()["data"]] == ["a", "b"]
    gateway.cut_off("a")
    listed = gateway.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m["max_model_len"]) for m in listed["data"]] == [("b", 256)]


def test_one_model_can_be_asked_for(start):
    gateway = start(models={**TWO, "org/c": {"model": "."}})
    assert gateway.client.get("/v1/models/org/c").json()["id"] == "org/c"
    assert gateway.client.get("/v1/models/other").status_code == 404
    gateway.cut_off("b")
    assert gateway.client.get("/v1/models/b").status_code == 504


def test_metrics_are_one_valid_exposition_of_the_gateway_and_all_workers(start):
    gateway = start(models=TWO)
    gateway.chat(model="a")
    response = gateway.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    kinds = [line for line in response.text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    samples = samples_of(response.text)
    assert samples["vllm:prompt_tokens_total", ("engine", "0"), ("model_name", "b")] == 7
    labels = ("handler", "/v1/completions"), ("method", "POST")
    assert samples["http_requests_total", *labels, ("model_name", "a"), ("status", "2xx")] == 3
    assert samples["trimtab_gateway_worker_up", ("model_name", "a"), ("replica", "0")] == 1
    own = ("control", ""), ("endpoint", "/v1/chat/completions"), ("model_name", "a"), ("status", "200")
    assert samples["trimtab_gateway_requests_total", *own] == 1
    assert samples["trimtab_gateway_requests_in_flight", ("model_name", "a")] == 0


def test_a_worker_that_is_down_does_not_spoil_the_scrape(start):
    gateway = start(models=TWO)
    gateway.cut_off("a")
    samples = samples_of(gateway.client.get("/metrics").text)
    assert samples["trimtab_gateway_worker_up", ("model_name", "a"), ("replica", "0")] == 0
    assert samples["vllm:prompt_tokens_total", ("engine", "0"), ("model_name", "b")] == 7


def test_what_clients_write_makes_no_label_values(start):
    gateway = start()
    gateway.chat(model="made-up")
    gateway.chat(control="made-up")
    gateway.client.get("/made-up")
    gateway.client.get("/v1/responses/made-up")
    text = gateway.client.get("/metrics").text
    assert "made-up" not in text
    assert 'endpoint="other",model_name="m",status="202"' in text
    assert 'endpoint="other",model_name="",status="404"' in text


def samples_of(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# Keys, ids, the log


@pytest.fixture
def locked(start, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# ours\nfirst\n\n second \n")
    monkeypatch.setenv("TRIMTAB_API_KEYS", "third, fourth")
    return start(api_keys_file="keys")


@pytest.mark.parametrize("key", ["Bearer first", "bearer second", "Bearer third", "Bearer fourth"])
def test_every_key_opens(locked, key):
    assert locked.client.get("/v1/models", headers={"authorization": key}).status_code == 200


@pytest.mark.parametrize(
    "key", ["", "Bearer", "Bearer ", "first", "Basic first", "Bearer firs", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/controls", "/version"])
def test_without_a_key_no_model_answers(locked, key, path):
    response = locked.client.get(path, headers={"authorization": key.encode("latin-1")})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert locked.error(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_and_scrapes_need_no_key(locked, path):
    assert locked.client.get(path).status_code == 200


def test_a_request_id_is_taken_over_passed_on_and_returned(start):
    response = start().client.get("/version", headers={"x-request-id": "abc-1"})
    assert response.headers.get_list("x-request-id") == ["abc-1"]
    assert response.json()["headers"]["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129])
def test_a_request_id_is_made_where_none_is_usable(start, given):
    headers = {} if given is None else {"x-request-id": given}
    response = start().client.get("/version", headers=headers)
    made = response.headers["x-request-id"]
    assert len(made) == 32
    assert response.json()["headers"]["x-request-id"] == made


def test_an_error_has_a_request_id_too(start):
    assert start().chat(model="x").headers["x-request-id"]


def test_the_log_has_a_line_for_each_request_and_no_word_of_it(start, pack, caplog):
    caplog.set_level(logging.INFO, logger="trimtab_server")
    gateway = start(controls={"one": str(pack)})
    gateway.chat(model="m", control="one", user="secret", messages=[{"role": "user", "content": "secret"}])
    (line,) = [r.getMessage() for r in caplog.records if r.name == "trimtab_server.api.request_log"]
    assert "POST /v1/chat/completions model=m control=one=0.5 status=200 seconds=0." in line
    assert "secret" not in caplog.text


def test_a_fault_of_the_gateways_own_is_an_error_object_without_its_insides(start, monkeypatch):
    gateway = start()
    monkeypatch.setattr("trimtab_server.api.routes.refuse_own_xargs", lambda _: 1 / 0)
    response = gateway.chat()
    assert response.status_code == 500
    assert gateway.error(response)["type"] == "server_error"
    assert "division" not in response.text
    assert response.headers["x-request-id"]
