"""Endpoints of a replica that the gateway does not answer itself: who may use them, and for which model."""

from __future__ import annotations

import io
import json

import pytest

from trimtab_server.api import forms
from trimtab_server.engines.vllm.endpoints import Access, methods_at, paths_with

TWO = {"a": {"model": "."}, "b": {"model": "."}}
AUDIO = b"RIFF\r\n\x00\xff--model\r\n" * 500


@pytest.fixture
def keyed(start, tmp_path, monkeypatch):
    """A gateway with an API key `client` and an admin key `chief`."""
    monkeypatch.setenv("TRIMTAB_API_KEYS", "client")
    monkeypatch.setenv("TRIMTAB_ADMIN_KEYS", "chief")
    return start


def ask(gateway, method, path, key=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return gateway.client.request(method, path.replace("{", "").replace("}", ""), headers=headers)


# Who may


@pytest.mark.parametrize("path", sorted(paths_with(Access.ADMIN)))
def test_without_admin_keys_nobody_reaches_an_administrative_endpoint(start, path):
    gateway = start()
    for method in ("POST", "GET", "DELETE"):
        response = ask(gateway, method, path)
        assert (response.status_code, gateway.error(response)["code"]) == (403, "forbidden")
        assert "x-from-worker" not in response.headers


def test_an_administrative_endpoint_needs_an_admin_key(keyed):
    gateway = keyed()
    answers = {key: ask(gateway, "POST", "/sleep?level=1", key) for key in (None, "wrong", "client", "chief")}
    statuses = {key: response.status_code for key, response in answers.items()}
    assert statuses == {None: 401, "wrong": 401, "client": 403, "chief": 202}
    assert answers["chief"].json()["target"] == "/sleep?level=1"


def test_an_endpoint_that_nobody_knows_is_there_for_admins_alone(keyed):
    gateway = keyed()
    answers = {key: ask(gateway, "GET", "/of/a/plugin", key) for key in (None, "client", "chief")}
    assert {key: response.status_code for key, response in answers.items()} == {
        None: 401,
        "client": 404,
        "chief": 202,
    }
    assert "There is no endpoint GET /of/a/plugin" in gateway.error(answers["client"])["message"]


def test_the_configuration_opens_paths_for_clients(keyed):
    gateway = keyed(pass_through=["/is_sleeping", "/of/{name}"])
    for path in ("/is_sleeping", "/of/mine"):
        assert ask(gateway, "GET", path, "client").status_code == 202
        assert ask(gateway, "GET", path).status_code == 401
    assert ask(gateway, "GET", "/of/mine/too", "client").status_code == 404


@pytest.mark.parametrize("path", sorted(paths_with(Access.DISABLED)))
def test_what_would_bypass_controls_is_disabled_for_admins_too(keyed, path):
    gateway = keyed()
    for spelled in (path, path + "/", path.upper()):
        response = ask(gateway, "POST", spelled, "chief")
        assert response.status_code == 404
        assert "disabled because it would bypass controls and limits" in gateway.error(response)["message"]


@pytest.mark.parametrize("path", sorted(paths_with(Access.CLIENT)))
def test_what_is_allowed_passes_with_its_own_methods_alone(start, path):
    gateway = start()
    for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        response = ask(gateway, method, path)
        if method in methods_at(path):
            assert (response.status_code, response.headers["x-from-worker"]) == (202, "m")
        else:
            assert response.status_code == 405
            assert response.headers["allow"] == ", ".join(sorted(methods_at(path)))


@pytest.mark.parametrize(
    ("path", "allowed", "refused"),
    [
        ("/v1/chat/completions", "POST", ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")),
        ("/v1/messages", "POST", ("GET", "HEAD", "OPTIONS")),
        ("/v1/models", "GET", ("POST", "HEAD", "OPTIONS")),
        ("/v1/models/m", "GET", ("POST", "HEAD", "OPTIONS")),
        ("/v1/load_control", "POST", ("GET", "HEAD", "OPTIONS")),
        ("/health", "GET, HEAD", ("POST", "OPTIONS")),
        ("/metrics", "GET", ("POST", "OPTIONS")),
        ("/openapi.json", "GET, HEAD", ("POST", "OPTIONS")),
    ],
)
def test_another_method_of_the_gateways_own_endpoints_is_405(start, path, allowed, refused):
    gateway = start()
    for method in refused:
        response = ask(gateway, method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert "x-from-worker" not in response.headers


def test_options_is_answered_without_a_key_and_never_passed_on(keyed):
    gateway = keyed()
    response = ask(gateway, "OPTIONS", "/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert ask(gateway, "OPTIONS", "/of/a/plugin").status_code == 401


# Forms


def transcribe(gateway, fields, path="/v1/audio/transcriptions", **options):
    return gateway.client.post(path, files={"file": ("a.wav", AUDIO, "audio/wav")}, data=fields, **options)


def test_a_form_names_its_model(start):
    gateway = start(models=TWO)
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        for model in "ab":
            response = transcribe(gateway, {"language": "de", "model": model}, path)
            assert response.headers["x-from-worker"] == model


def test_a_form_passes_byte_for_byte(start):
    response = transcribe(start(), {"model": "m", "prompt": "ä \r\n"})
    seen = response.json()
    assert seen["body"].encode("latin-1") == response.request.read()
    assert seen["headers"]["content-type"].startswith("multipart/form-data; boundary=")


def test_an_alias_in_a_form_is_resolved_and_nothing_else_changes(two_models):
    response = transcribe(two_models, {"prompt": "plain:one", "model": "plain:one=0.7"})
    assert response.headers["x-from-worker"] == "plain"
    seen, sent = response.json()["body"].encode("latin-1"), response.request.read()
    assert seen == sent.replace(b'name="model"\r\n\r\nplain:one=0.7\r\n', b'name="model"\r\n\r\nplain\r\n')
    assert len(seen) == len(sent) - len(":one=0.7")
    assert int(response.json()["headers"]["content-length"]) == len(seen)


def test_a_file_called_model_names_none(start):
    gateway = start(models=TWO)
    files = {"model": ("a", b"a"), "file": ("x", b"x")}
    response = gateway.client.post("/v1/audio/transcriptions", files=files)
    assert (response.status_code, gateway.error(response)["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({}, 400, "model"),
        ({"model": ["a", "b"]}, 400, "model"),
        ({"model": "a" * 70_000}, 400, "model"),
        ({"model": b"\xff"}, 400, "model"),
        ({"model": "a", "control": "one"}, 400, "control"),
        ({"model": "a", "vllm_xargs": '{"trimtab_control": "one"}'}, 400, "vllm_xargs.trimtab_control"),
    ],
)
def test_a_form_that_can_not_be_routed_is_refused_with_its_place(start, fields, status, param):
    gateway = start(models=TWO)
    response = transcribe(gateway, fields)
    assert (response.status_code, gateway.error(response)["param"]) == (status, param)


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary_is_refused(start, kind):
    gateway = start()
    response = gateway.client.post("/v1/audio/transcriptions", content=b"x", headers={"content-type": kind})
    assert (response.status_code, gateway.error(response)["code"]) == (400, "invalid_form")


def test_a_body_that_is_no_form_is_refused(start):
    gateway = start()
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = gateway.client.post("/v1/audio/transcriptions", content=b"no form", headers=headers)
    assert (response.status_code, gateway.error(response)["code"]) == (400, "invalid_form")


def test_a_form_has_the_limit_of_every_body(start):
    gateway = start(limits={"body_bytes": 1000})
    response = transcribe(gateway, {"model": "m"})
    assert (response.status_code, gateway.error(response)["code"]) == (413, "body_too_large")


def test_a_form_is_read_without_a_copy_of_its_file():
    import tracemalloc

    from trimtab_server.api.forms import read_fields

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    body = head + b"\r\n-" * 2**22 + tail
    tracemalloc.start()
    try:
        (field,) = read_fields(io.BytesIO(body), b"x", ("model",))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (field.value, body[field.start : field.end]) == ("m", b"m")
    assert peak < 2**20


@pytest.mark.parametrize("size", range(1, 40))
def test_fields_are_found_wherever_the_body_is_cut_into_pieces(monkeypatch, size):
    monkeypatch.setattr(forms, "_PIECE_BYTES", size)
    head = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    for value in (b"", b"m", b"\r", b"\r\n", b"\r\n-", b"\r\n--", b"\r\n--y\r\n-\r\n", b"a\r\n--\r\n--b"):
        body = io.BytesIO(head + value + b"\r\n--x--\r\n")
        (field,) = forms.read_fields(body, b"x", ("model",))
        assert field.value.encode() == value
        assert not value or body.getvalue()[field.start : field.end] == value
        output = io.BytesIO()
        forms.write_with_value(body, field, "new", output)
        assert not value or output.getvalue() == head + b"new\r\n--x--\r\n"


# The OpenAI SDK


def test_the_openai_sdk_transcribes_by_an_alias(start, pack):
    import openai

    gateway = start(models=TWO, controls={"one": str(pack)})
    with openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=gateway.client) as client:
        raw = client.audio.transcriptions.with_raw_response.create(file=("a.wav", AUDIO), model="b:one=1")
    assert raw.headers["x-from-worker"] == "b"
    assert 'name="model"\r\n\r\nb\r\n' in json.loads(raw.content)["body"]


def test_a_form_in_another_charset_is_refused(start):
    """The replica would find fields in it whose names the gateway can't read."""
    gateway = start()
    body = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    for charset, status in (("utf-16-le", 400), ("unicode_escape", 400), ("UTF-8", 202)):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        response = gateway.client.post("/v1/audio/transcriptions", content=body, headers=headers)
        assert response.status_code == status
