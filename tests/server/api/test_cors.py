"""Pages of other origins: none may use the gateway, but those that the configuration names."""

from __future__ import annotations

import pytest

PAGE = "https://chat.example.org"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}


@pytest.fixture
def allowed(start, tmp_path):
    """A gateway with keys, for `PAGE`."""
    (tmp_path / "keys").write_text("key\n")
    return start(cors={"allow_origins": [PAGE]}, api_keys_file="keys")


def names(response) -> set[str]:
    return {name for name in response.headers if name.startswith("access-control-")}


def test_without_a_configuration_no_answer_has_a_word_for_browsers(start):
    client = start().client
    assert names(client.get("/v1/models", headers={"origin": PAGE})) == set()
    assert names(client.options("/v1/models", headers=PREFLIGHT)) == set()


def test_a_preflight_passes_without_a_key(allowed):
    asked = {**PREFLIGHT, "access-control-request-headers": "authorization, content-type"}
    response = allowed.client.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-headers"] == "authorization, content-type"
    assert response.headers["x-request-id"]


def test_a_page_may_read_which_control_was_applied(allowed):
    response = allowed.client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hi"}]},
        headers={"origin": PAGE, "authorization": "Bearer key"},
    )
    assert response.headers["x-trimtab-control"] == "off"
    assert response.headers["access-control-allow-origin"] == PAGE
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"x-trimtab-control", "x-request-id", "request-id"} <= set(exposed)


def test_a_page_may_read_that_its_key_is_wrong(allowed):
    response = allowed.client.get("/v1/models", headers={"origin": PAGE})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == PAGE


def test_another_page_is_refused(allowed):
    other = "https://evil.example.org"
    assert allowed.client.options("/v1/models", headers={**PREFLIGHT, "origin": other}).status_code == 400
    answer = allowed.client.get("/v1/models", headers={"origin": other, "authorization": "Bearer key"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_pattern_is_for_whole_origins(start):
    client = start(cors={"allow_origin_regex": r"https://.*\.example\.org"}).client
    for origin, status in ((PAGE, 200), (PAGE + ".evil.com", 400)):
        assert client.options("/v1/models", headers={**PREFLIGHT, "origin": origin}).status_code == status
