"""Errors of `/v1/messages` as Anthropic's clients read them."""

from __future__ import annotations

import anthropic
import pytest

from trimtab_server.engines.replica import State

BODY = {"max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def keyed(start, pack, monkeypatch):
    monkeypatch.setenv("TRIMTAB_API_KEYS", "key")
    return start(controls={"one": str(pack)}, limits={"body_bytes": 10_000, "concurrent": 1, "queued": 0})


def client_of(gateway, key="key") -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url="http://testserver", auth_token=key, max_retries=0, http_client=gateway.client
    )


def create(gateway, key="key", **body):
    return client_of(gateway, key).messages.create(**{"model": "m", **BODY, **body})


@pytest.mark.parametrize(
    ("body", "raised", "kind"),
    [
        ({"extra_body": {"control": "nobody"}}, anthropic.BadRequestError, "invalid_request_error"),
        ({"key": "wrong"}, anthropic.AuthenticationError, "authentication_error"),
        ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
        ({"system": "x" * 20_000}, anthropic.APIStatusError, "request_too_large"),
        ({"extra_body": {"fake": {"hang_up": "before"}}}, anthropic.InternalServerError, "api_error"),
    ],
)
def test_the_sdk_raises_the_errors_own_class(keyed, body, raised, kind):
    with pytest.raises(raised) as caught:
        create(keyed, **body)
    error = caught.value
    assert error.body["type"] == "error"
    assert error.body["error"] == {"type": kind, "message": error.body["error"]["message"]}
    assert error.body["error"]["message"]
    assert error.request_id == error.body["request_id"] == error.response.headers["x-request-id"]
    assert set(error.body) == {"type", "error", "request_id"}


def test_a_worker_that_is_not_ready_is_overloaded(keyed):
    keyed.replica("m").state = State.STARTING
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(keyed)
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (503, "overloaded_error")
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_stream_that_breaks_raises_in_the_sdk(keyed):
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(create(keyed, stream=True, extra_body={"fake": {"hang_up": "midway"}}))
    assert caught.value.body["error"]["type"] == "api_error"
    assert "broke off" in caught.value.body["error"]["message"]
    assert caught.value.body["request_id"] == caught.value.request_id


def test_an_answer_has_the_id_where_the_sdk_looks_for_it(keyed):
    message = create(keyed)
    assert message._request_id
    assert (
        keyed.client.get("/version", headers={"authorization": "Bearer key"}).headers.get("request-id")
        is None
    )


@pytest.mark.parametrize(
    ("line", "headers", "status", "kind"),
    [
        ("GET /v1/messages", {}, 405, "invalid_request_error"),
        ("POST /v1/messages", {"content-type": "text/plain"}, 415, "invalid_request_error"),
        ("POST /v1/messages/count_tokens", {"authorization": "Bearer x"}, 401, "authentication_error"),
        ("POST /v1/messages/made_up", {}, 404, "not_found_error"),
    ],
)
def test_every_error_below_the_endpoint_has_the_shape(keyed, line, headers, status, kind):
    headers = {"authorization": "Bearer key", **headers}
    response = keyed.client.request(*line.split(), headers=headers, content=b"{")
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.json()["request_id"] == response.headers["request-id"]


def test_a_fault_of_the_gateways_own_has_the_shape(keyed, monkeypatch):
    monkeypatch.setattr("trimtab_server.api.routes.refuse_own_xargs", lambda _: 1 / 0)
    with pytest.raises(anthropic.InternalServerError) as caught:
        create(keyed)
    assert caught.value.body["error"]["type"] == "api_error"
    assert caught.value.request_id == caught.value.body["request_id"]


@pytest.mark.parametrize(
    "body",
    [
        {
            "error": {
                "message": "`max_tokens`: Field required",
                "type": "Bad Request",
                "param": None,
                "code": 400,
            }
        },
        {"type": "error", "error": {"type": "BadRequestError", "message": "`max_tokens`: Field required"}},
    ],
    ids=["OpenAI's shape", "a kind of vLLM's own"],
)
@pytest.mark.parametrize("model", ["m", "m:one"])
def test_an_error_of_the_worker_s_has_the_shape(keyed, body, model):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(keyed, model=model, extra_body={"fake": {"refusal": {"status": 400, "body": body}}})
    error = caught.value
    assert error.body["error"] == {"type": "invalid_request_error", "message": "`max_tokens`: Field required"}
    assert error.request_id == error.body["request_id"]
    assert int(error.response.headers["content-length"]) == len(error.response.content)


@pytest.mark.parametrize("body", [[1], {"detail": "no"}, {"error": "no"}, {"error": {"message": 1}}])
def test_what_is_no_error_object_passes_as_it_is(keyed, body):
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(keyed, extra_body={"fake": {"refusal": {"status": 529, "body": body}}})
    assert (caught.value.status_code, caught.value.response.json()) == (529, body)


def test_other_endpoints_keep_openais_shape(keyed):
    response = keyed.chat(model="m")
    assert keyed.error(response)["code"] == "invalid_api_key"
