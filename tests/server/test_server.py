"""What the gateway warns of when it starts."""

from __future__ import annotations

import pytest

from trimtab_server.config.schema import load_settings
from trimtab_server.server import _warn_of_open_doors


@pytest.fixture
def warnings(write_config, caplog):
    def warnings(**config) -> list[str]:
        _warn_of_open_doors(load_settings(write_config({"models": {"m": {"model": "org/m"}}, **config})))
        return caplog.messages

    return warnings


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_this_machine_alone_no_key_is_needed(warnings, host):
    assert warnings(host=host) == []


@pytest.mark.parametrize("host", ["192.0.2.1", "::", "some.name"])
def test_elsewhere_keys_are_missed(warnings, host, monkeypatch):
    (message,) = warnings(host=host)
    assert message == f"listening on {host} without API keys: everyone who can reach this port can use it"


def test_with_keys_nothing_is_missed(warnings, monkeypatch):
    monkeypatch.setenv("TRIMTAB_API_KEYS", "k")
    assert warnings(host="192.0.2.1") == []


def test_roots_without_admin_keys_are_of_no_use(warnings, monkeypatch):
    (message,) = warnings(control_roots=["."])
    assert message.startswith("control_roots has no effect without admin keys. Set admin_keys_file")


def test_roots_with_admin_keys_are(warnings, monkeypatch):
    monkeypatch.setenv("TRIMTAB_ADMIN_KEYS", "k")
    assert warnings(control_roots=["."]) == []


def test_vllms_own_variable_for_keys_has_no_effect(warnings, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert warnings() == ["VLLM_API_KEY has no effect here: the gateway's keys are in TRIMTAB_API_KEYS"]
