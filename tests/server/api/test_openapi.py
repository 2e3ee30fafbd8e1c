"""The published document says what the gateway does: Schemathesis holds one to the other."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path

import pytest

from served import served
from serving import get_json

SCHEMATHESIS = Path(__file__).resolve().parents[3] / ".venv-clients" / "bin" / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, pack, monkeypatch_module):
    root = tmp_path_factory.mktemp("openapi")
    monkeypatch_module.setenv("TRIMTAB_ADMIN_KEYS", "chief")
    config = {"controls": {"one": str(pack)}, "control_roots": ["."], "models": {"m": {}}}
    with served(root, **config) as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_document_has_every_endpoint_of_the_gateways_own(gateway):
    document = get_json(f"{gateway.url}/openapi.json")
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} < set(
        document["paths"]
    )
    assert {"/v1/models", "/v1/controls", "/v1/load_control", "/v1/unload_control"} < set(document["paths"])
    assert {"/health", "/ready", "/metrics"} < set(document["paths"])
    chat = document["paths"]["/v1/chat/completions"]["post"]
    fields = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"model", "messages", "control"} <= set(fields)
    assert "x-trimtab-control" in chat["responses"]["200"]["headers"]
    assert chat["parameters"][0]["name"] == "x-trimtab-control"


def test_the_document_has_the_errors_of_messages_in_anthropics_shape(gateway):
    document = get_json(f"{gateway.url}/openapi.json")
    answer = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]["application/json"]
    assert answer["schema"]["anyOf"][0] == {"$ref": "#/components/schemas/AnthropicErrorAnswer"}
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["400"]["content"][
        "application/json"
    ]
    assert chat["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_no_operation_has_the_id_of_another(gateway):
    document = get_json(f"{gateway.url}/openapi.json")
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


def test_no_request_that_the_document_allows_or_forbids_finds_the_gateway_otherwise(gateway, tmp_path):
    command = [
        *(str(SCHEMATHESIS), "run", f"{gateway.url}/openapi.json", "--checks", CHECKS),
        *("--max-examples", "30", "--seed", "1", "--phases", "examples,fuzzing", "--workers", "1"),
        *("-H", "Authorization: Bearer chief", "--suppress-health-check", "all"),
        *("--exclude-path", "/metrics"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert urllib.request.urlopen(f"{gateway.url}/ready").status == 200
