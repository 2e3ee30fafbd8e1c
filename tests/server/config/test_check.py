"""`trimtab check`: what can be said of a configuration before anything is started."""

from __future__ import annotations

import os
import shutil
import socket

import pytest
from typer.testing import CliRunner

import hand_made
from serving import free_port
from trimtab_mappings import cached_table, load_encoder, load_vocabulary
from trimtab_server.cli import app
from trimtab_server.config import check as check_module

ONE = {"m": {"model": "org/name"}}


@pytest.fixture
def check(write_config):
    """Check a configuration; returns the status, the lines on stdout and those on stderr."""

    def check(**config):
        path = write_config({"models": ONE, "port": 0, **config})
        result = CliRunner().invoke(app, ["check", str(path)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()

    return check


@pytest.fixture
def faults(check):
    """The faults of a configuration, which must have some."""

    def faults(**config) -> list[str]:
        status, _, lines = check(**config)
        assert status == 2
        assert "can't be served as it is" in lines[-1]
        return lines[:-1]

    return faults


def test_what_would_be_served_is_told_line_by_line(check, family, tmp_path):
    models = {"here": {"model": str(family.a)}, "there": {"model": "org/name", "controls": []}}
    status, lines, errors = check(models=models, controls={"one": str(family.control), "hub": "org/c"})
    assert (status, errors) == (0, [])
    tokens, own = (len(load_vocabulary(str(place)).tokens) for place in (family.a, family.control))
    assert lines == [
        f"models.here: {family.a} (directory), {tokens} tokens",
        "models.there: org/name (hub id, not looked up)",
        "controls.hub: org/c (hub id, not looked up)",
        f"controls.one: {family.control} (directory), {own} tokens",
        "models.here with one: the mapping table will be built at start",
        "api_keys_file: 0 API keys",
        "admin_keys_file: 0 admin keys",
        "port: 127.0.0.1:0 is free",
        f"{tmp_path / 'trimtab.yaml'} is valid: http://127.0.0.1:0",
    ]
    assert not (tmp_path / "tables").exists()


def test_all_faults_are_told_at_once(faults, tmp_path):
    (tmp_path / "empty").mkdir()
    found = faults(
        models={"m": {"model": "empty"}},
        controls={"c": "empty"},
        control_roots=["missing"],
        api_keys_file="none",
    )
    assert [line.partition(": ")[0] for line in found] == [
        *("models.m", "controls.c", "controls.c", "controls.c", "control_roots.0", "api_keys_file")
    ]


# Models and packs


def test_a_model_without_a_configuration_is_none(faults, tmp_path):
    assert faults(models={"m": {"model": "."}}) == [f"models.m: {tmp_path} has no config.json"]


def test_a_controlled_model_without_a_tokenizer_is_a_fault_and_another_is_vllms_affair(
    check, faults, tmp_path, family
):
    (tmp_path / "config.json").write_text("{}")
    controls = {"c": str(family.control)}
    (fault,) = faults(models={"m": {"model": "."}}, controls=controls)
    assert fault.startswith("models.m: no tokenizer can be loaded from")
    status, lines, _ = check(models={"m": {"model": ".", "controls": []}}, controls=controls)
    assert status == 0
    assert lines[0].startswith("models.m: no tokenizer can be loaded from")


def test_a_tokenizer_without_an_end_is_told(check, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    byte_level = hand_made.encoder([*"abc"]).tokenizer
    byte_level.save_pretrained(tmp_path)
    _, lines, _ = check(models={"m": {"model": "."}})
    end = "3 tokens, none of them an eos: a control has no say in where answers end"
    assert lines[0] == f"models.m: {tmp_path} (directory), {end}"


def test_a_tokenizer_may_be_elsewhere(check, tmp_path, family):
    (tmp_path / "config.json").write_text("{}")
    models = {"m": {"model": ".", "args": {"tokenizer": str(family.b)}}}
    status, lines, _ = check(models=models, controls={"c": str(family.control)})
    assert status == 0
    assert "models.m with c: the mapping table will be built at start" in lines


def test_workers_elsewhere_are_not_asked_but_their_keys_must_be_there(check, faults, monkeypatch):
    replica = {"url": "http://there:8000", "key_variable": "THEIR_KEY"}
    config = {"models": {"m": {"replicas": [replica]}}}
    assert faults(**config) == ["models.m.replicas.0.key_variable: the environment has no THEIR_KEY"]
    monkeypatch.setenv("THEIR_KEY", "k")
    assert check(**config)[1][0] == "models.m.replicas.0: http://there:8000 (elsewhere, not asked)"


def test_a_pack_needs_weights_that_are_safetensors(faults, tmp_path, family):
    shutil.copytree(family.control, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(b"")
    assert faults(controls={"c": "c"}) == [f"controls.c: {tmp_path / 'c'} has no weights in *.safetensors"]


def test_a_manifest_is_read(faults, tmp_path):
    (tmp_path / "trimtab.json").write_text('{"strenght": 1}')
    (fault,) = faults(controls={"c": "."})
    assert fault.startswith("controls.c: ")
    assert "strenght" in fault


# Tables


@pytest.fixture
def with_table(check, family, tmp_path):
    """Check model `m` under control `c`; returns what is said of their table. The table is there."""
    cached_table(load_encoder(str(family.b)), load_encoder(str(family.control)), tmp_path / "tables")

    def told() -> str:
        status, lines, _ = check(models={"m": {"model": str(family.b)}}, controls={"c": str(family.control)})
        assert status == 0
        return next(line for line in lines if line.startswith("models.m with c: "))

    return told


def test_a_table_that_is_there_is_read(with_table, tmp_path):
    (path,) = (tmp_path / "tables").iterdir()
    assert with_table().startswith(f"models.m with c: the mapping table {path}, ")
    assert with_table().endswith(" tokens exact")


def test_a_table_that_is_damaged_will_be_built_anew(with_table, tmp_path):
    (path,) = (tmp_path / "tables").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert "the mapping table will be built anew at start: " in with_table()


def test_a_table_of_others_is_told_by_its_fingerprints(with_table, tmp_path, family):
    (path,) = (tmp_path / "tables").iterdir()
    cached_table(load_encoder(str(family.c)), load_encoder(str(family.control)), tmp_path / "others")
    (other,) = (tmp_path / "others").iterdir()
    shutil.copy(other, path)
    assert "built anew at start" in with_table()
    assert "its target is" in with_table()


# The machine


@pytest.mark.parametrize(
    ("seen", "devices", "said"),
    [
        (2, [0, 1], "models.m.replicas.0.devices: 0, 1 of 2 CUDA devices"),
        (2, ["GPU-1234"], "models.m.replicas.0.devices: GPU-1234 of 2 CUDA devices"),
        (
            None,
            [7],
            "models.m.replicas.0.devices: 7: not looked up, torch sees no CUDA here, or not all of it",
        ),
    ],
)
def test_devices_are_counted_where_torch_sees_them(check, monkeypatch, seen, devices, said):
    monkeypatch.setattr(check_module, "_cuda_devices", lambda: seen)
    status, lines, _ = check(models={"m": {"model": "org/m", "replicas": [{"devices": devices}]}})
    assert status == 0
    assert said in lines


def test_a_device_that_is_not_there_is_a_fault(faults, monkeypatch):
    monkeypatch.setattr(check_module, "_cuda_devices", lambda: 2)
    found = faults(models={"m": {"model": "org/m", "replicas": [{}, {"devices": [1, 2]}]}})
    assert found == ["models.m.replicas.1.devices: there is no device 2; there are 2, counted from 0"]


def test_cores_must_be_this_process_s(check, faults, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    model = {"model": "org/m", "replicas": [{"cpus": "0-1|2"}], "plugin": {"control_cpus": [3]}}
    status, lines, _ = check(models={"m": model})
    assert status == 0
    assert "models.m.replicas.0.cpus: 0-1|2, of 4 cores" in lines
    assert "models.m.plugin.control_cpus: 3, of 4 cores" in lines
    model = {"model": "org/m", "replicas": [{"cpus": "2-5"}], "plugin": {"control_cpus": [9]}}
    assert faults(models={"m": model}) == [
        "models.m.replicas.0.cpus: no core 4, 5 for this process; it has 0, 1, 2, 3",
        "models.m.plugin.control_cpus: no core 9 for this process; it has 0, 1, 2, 3",
    ]


def test_cores_that_vllm_chooses_are_left_to_it(check):
    _, lines, _ = check(models={"m": {"model": "org/m", "replicas": [{"cpus": "auto"}]}})
    assert "models.m.replicas.0.cpus: auto: no list of cores, left to vLLM" in lines


def test_roots_keys_and_certificates_must_be_there(faults, tmp_path):
    (tmp_path / "none").write_text("# no key\n")
    found = faults(control_roots=["."], admin_keys_file="none", tls={"certfile": "missing.pem"})
    assert found == [
        f"admin_keys_file: {tmp_path / 'none'} holds no key: write one a line, or leave the setting out",
        f"tls.certfile: {tmp_path / 'missing.pem'} can't be read",
    ]


def test_a_port_that_is_taken_is_a_fault(faults, check):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (fault,) = faults(port=port)
        assert fault.startswith(f"port: 127.0.0.1:{port} can't be had: ")
    assert check(port=free_port())[0] == 0


def test_an_address_that_is_not_this_machine_s_is_a_fault(faults):
    assert faults(host="192.0.2.1", port=8000)[0].startswith("port: 192.0.2.1:8000 can't be had: ")
