"""Controls that come and go while the gateway runs, and who may see to it."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fake_vllm import CONTROLS, MAPPING
from trimtab_processors.parameters import parse_xargs
from trimtab_server.engines.replica import State

HEADER = "x-trimtab-control"
ADMIN = {"authorization": "Bearer chief"}


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    monkeypatch.setenv("TRIMTAB_ADMIN_KEYS", "chief, deputy")


@pytest.fixture
def root(tmp_path, pack):
    """A directory that controls may be loaded from, with a pack in it."""
    shutil.copytree(pack, tmp_path / "root" / "pack")
    return tmp_path / "root"


@pytest.fixture
def gateway(start, root, pack):
    """`all` takes every control, and so does `twin`, of which there are two; `some` offers one only."""
    return start(
        controls={"one": str(pack)},
        control_roots=["root"],
        models={
            "all": {"model": "."},
            "twin": {"model": ".", "replicas": [{}, {}]},
            "some": {"model": ".", "controls": ["one"]},
        },
    )


def load(gateway, name="late", path="pack", headers=ADMIN, **more):
    root = gateway.settings.control_roots[0]
    body = {"control_name": name, "control_path": str(root / path), **more}
    return gateway.client.post("/v1/load_control", json=body, headers=headers)


def unload(gateway, name="late", headers=ADMIN):
    return gateway.client.post("/v1/unload_control", json={"control_name": name}, headers=headers)


def changes(gateway, model, replica=0):
    """What the replica has been told."""
    return gateway.replicas.seen[model, replica]["changes"]


def listed(gateway):
    return {control["id"]: control for control in gateway.client.get("/v1/controls").json()["data"]}


def test_a_loaded_control_is_offered_by_every_model_that_takes_all(gateway):
    assert load(gateway).json() == {"status": "loaded", "control_name": "late"}
    assert listed(gateway)["late"]["models"] == ["all", "twin"]
    assert listed(gateway)["late"]["loaded"] is True
    assert listed(gateway)["late"]["mappings"]["twin"] == MAPPING
    assert changes(gateway, "all") == changes(gateway, "twin") == changes(gateway, "twin", 1)
    assert changes(gateway, "all") == [["load", "late"]]
    assert changes(gateway, "some") == []
    response = gateway.chat(model="all", control=["one", "late"])
    assert response.headers[HEADER] == "one=0.5,late=0.5"
    assert parse_xargs(gateway.last("all")["vllm_xargs"])[1].prompt
    assert gateway.chat(model="all:late").status_code == 200
    assert gateway.chat(model="some", control="late").status_code == 400


def test_a_worker_says_how_long_a_prompt_it_takes_once_it_has_a_control(gateway):
    gateway.replica("all").prompt_bytes = None
    load(gateway)
    assert gateway.replica("all").prompt_bytes == 256 * MAPPING["longest_target_token"]


def test_an_unloaded_control_is_as_if_it_had_never_been(gateway):
    load(gateway)
    assert unload(gateway).json() == {"status": "unloaded", "control_name": "late"}
    assert set(listed(gateway)) == {"one"}
    assert changes(gateway, "twin", 1) == [["load", "late"], ["unload", "late"]]
    response = gateway.chat(model="all", control="late")
    assert gateway.error(response)["code"] == "control_not_found"
    assert load(gateway).status_code == 200


def test_a_control_may_be_loaded_for_some_models_only(gateway):
    assert load(gateway, models=["some"]).status_code == 200
    assert listed(gateway)["late"]["models"] == ["some"]
    assert (changes(gateway, "all"), changes(gateway, "some")) == ([], [["load", "late"]])
    assert gateway.chat(model="some", control="late").status_code == 200
    response = load(gateway, "other", models=["nobody"])
    assert (response.status_code, gateway.error(response)["param"]) == (400, "models")


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "Bearer user"}, 403)],
)
def test_only_who_has_an_admin_key_may_change_anything(start, root, monkeypatch, headers, status):
    monkeypatch.setenv("TRIMTAB_API_KEYS", "user")
    gateway = start(control_roots=["root"])
    body = {"control_name": "late", "control_path": str(root / "pack")}
    for path in ("/v1/load_control", "/v1/unload_control"):
        response = gateway.client.post(path, json=body, headers=headers)
        assert response.status_code == status
        assert gateway.error(response)["param"] is None
    assert changes(gateway, "m") == []
    assert gateway.client.get("/v1/controls", headers=ADMIN).json()["data"] == []


def test_without_admin_keys_nobody_may(start, root, monkeypatch):
    monkeypatch.delenv("TRIMTAB_ADMIN_KEYS")
    response = load(start(control_roots=["root"]))
    assert response.status_code == 403
    assert "Admin endpoints are disabled" in response.json()["error"]["message"]


def test_without_roots_nothing_can_be_loaded(start, root):
    gateway = start()
    body = {"control_name": "late", "control_path": str(root / "pack")}
    response = gateway.client.post("/v1/load_control", json=body, headers=ADMIN)
    assert (response.status_code, gateway.error(response)["code"]) == (403, "forbidden")


@pytest.mark.parametrize("path", ["..", "../root/../..", "missing", "link", "linked", "far", ""])
def test_no_path_leads_out_of_the_roots(gateway, root, pack, path):
    """By `..`, by a link to a directory or a file, by a component of the pack."""
    (root / "link").symlink_to(pack)
    shutil.copytree(pack, root / "linked")
    (root / "linked" / "model.safetensors").symlink_to(pack / "tokenizer.json")
    shutil.copytree(pack, root / "far")
    (root / "far" / "trimtab.json").write_text('{"components": [{"model": "org/elsewhere"}]}')
    response = load(gateway, path=path)
    assert response.status_code == 400
    assert gateway.error(response)["param"] == "control_path"
    assert "late" not in listed(gateway)
    assert changes(gateway, "all") == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"control_path": "x"}, "control_name"),
        ({"control_name": "../x", "control_path": "x"}, "control_name"),
        ({"control_name": "x"}, "control_path"),
        ({"control_name": "x", "control_path": ""}, "control_path"),
        ({"control_name": "x", "control_path": "y", "z": 1}, "z"),
        ({"control_name": "x", "control_path": "y", "models": "all"}, "models"),
    ],
)
def test_a_body_that_is_not_as_it_should_be_is_refused_with_its_place(gateway, body, param):
    response = gateway.client.post("/v1/load_control", json=body, headers=ADMIN)
    assert (response.status_code, gateway.error(response)["param"]) == (400, param)


def test_names_are_taken_once(gateway):
    for name in ("one", "late"):
        load(gateway)
        response = load(gateway, name)
        assert (response.status_code, gateway.error(response)["param"]) == (409, "control_name")


def test_what_the_configuration_has_stays(gateway):
    assert unload(gateway, "one").status_code == 409
    assert unload(gateway, "nobody").status_code == 404


def test_there_are_no_more_controls_than_may_be(start, root, pack):
    gateway = start(controls={"one": str(pack)}, control_roots=["root"], limits={"controls": 2})
    assert load(gateway, "two").status_code == 200
    response = load(gateway, "three")
    assert response.status_code == 409
    assert "as many as may be" in gateway.error(response)["message"]
    unload(gateway, "two")
    assert load(gateway, "three").status_code == 200


def test_where_one_worker_can_not_load_it_none_keeps_it(gateway, root):
    (root / "pack" / "unusable").touch()
    response = load(gateway)
    assert response.status_code == 400
    assert "late can't be loaded here" in gateway.error(response)["message"]
    assert "late" not in listed(gateway)
    assert changes(gateway, "all") == [["load", "late"], ["unload", "late"]]
    (root / "pack" / "unusable").unlink()
    assert load(gateway).status_code == 200


def test_unloading_waits_for_the_requests_that_have_it(gateway):
    """Which end as they would have; no new one gets it meanwhile."""
    load(gateway)
    body = {
        "model": "all:late",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "fake": {"tokens": 5, "pause": 0.2},
    }
    seen = []
    with ThreadPoolExecutor() as pool:
        with gateway.client.stream("POST", "/v1/chat/completions", json=body) as stream:
            pieces = stream.iter_lines()
            seen.append(next(pieces))
            unloading = pool.submit(unload, gateway)
            while "late" in listed(gateway):
                pass
            assert gateway.chat(model="all", control="late").status_code == 400
            assert load(gateway).status_code == 409
            assert not unloading.done()
            assert changes(gateway, "all") == [["load", "late"]]
            seen += [line for line in pieces if line]
        assert seen[-1] == "data: [DONE]"
        assert unloading.result(10).status_code == 200
    assert changes(gateway, "all") == [["load", "late"], ["unload", "late"]]


def test_a_worker_that_comes_back_has_what_was_loaded_before_it_gets_requests(gateway):
    load(gateway)
    replica = gateway.replica("twin", 1)
    replica.state = State.UNRESPONSIVE
    load(gateway, "later")
    assert changes(gateway, "twin", 0)[-1] == ["load", "later"]
    assert changes(gateway, "twin", 1) == [["load", "late"]]
    gateway.client.portal.call(replica._become_ready)
    assert changes(gateway, "twin", 1) == [["load", "late"], ["load", "later"]]
    assert replica.state is State.READY


def test_a_worker_that_comes_back_lets_go_of_what_was_unloaded_without_it(gateway):
    """Else the same name would mean the old pack when it is loaded again."""
    load(gateway)
    replica = gateway.replica("twin", 1)
    replica.state = State.UNRESPONSIVE
    assert unload(gateway).status_code == 200
    assert changes(gateway, "twin", 1) == [["load", "late"]]
    assert load(gateway).status_code == 200
    gateway.client.portal.call(replica._become_ready)
    assert changes(gateway, "twin", 1) == [["load", "late"], ["unload", "late"], ["load", "late"]]


def test_a_worker_that_can_not_have_a_control_any_more_goes_on_without_it(gateway, root):
    """Its other requests are nobody's to lose."""
    load(gateway)
    load(gateway, "other")
    replica = gateway.replica("twin", 1)
    replica.state = State.UNRESPONSIVE
    app = gateway.replicas.apps["twin", 1]
    app[CONTROLS].clear()
    (root / "pack" / "unusable").touch()
    gateway.client.portal.call(replica._become_ready)
    assert replica.state is State.READY
    assert gateway.chat(model="twin").status_code == 200


def test_what_is_loaded_while_a_worker_is_being_prepared_is_not_missed(gateway, root):
    load(gateway)
    replica = gateway.replica("twin", 1)
    replica.state = State.UNRESPONSIVE
    gateway.replicas.apps["twin", 1][CONTROLS].clear()
    (root / "pack" / "slow").touch()
    shutil.copytree(root / "pack", root / "other", ignore=shutil.ignore_patterns("slow"))
    with ThreadPoolExecutor() as pool:
        preparing = pool.submit(gateway.client.portal.call, replica._become_ready)
        while changes(gateway, "twin", 1)[-1] != ["load", "late"] or len(changes(gateway, "twin", 1)) < 2:
            threading.Event().wait(0.01)
        assert load(gateway, "other", "other").status_code == 200
        preparing.result(10)
    assert set(gateway.replicas.apps["twin", 1][CONTROLS]) == {"late", "other"}


def test_a_control_is_not_loaded_while_nobody_could_say_what_becomes_of_it(gateway):
    for replica in (gateway.replica("all"), gateway.replica("twin"), gateway.replica("twin", 1)):
        replica.state = State.STARTING
    response = load(gateway)
    assert (response.status_code, gateway.error(response)["code"]) == (503, "model_not_ready")
    assert "late" not in listed(gateway)


def test_another_workers_control_of_the_same_name_is_not_touched(gateway):
    gateway.replicas.apps["all", 0][CONTROLS]["late"] = "/somebody/elses"
    response = load(gateway)
    assert (response.status_code, gateway.error(response)["code"]) == (409, "conflict")
    assert gateway.replicas.apps["all", 0][CONTROLS]["late"] == "/somebody/elses"


@pytest.mark.parametrize("name", ["on", "off"])
def test_a_control_is_not_called_what_has_a_meaning_of_its_own(gateway, name):
    assert load(gateway, name).status_code == 400


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 1500])
def test_a_path_that_no_file_can_have_is_refused(gateway, path):
    response = load(gateway, path=path)
    assert (response.status_code, gateway.error(response)["param"]) == (400, "control_path")


def test_a_model_that_takes_no_control_is_given_none(start, root):
    gateway = start(control_roots=["root"], models={"m": {"model": ".", "controls": []}, "n": {"model": "."}})
    assert load(gateway).status_code == 200
    assert listed(gateway)["late"]["models"] == ["n"]
    response = load(gateway, "other", models=["m"])
    assert "'m' can't have controls; these can: n" in gateway.error(response)["message"]


def test_loading_holds_up_nobody(gateway, root):
    (root / "pack" / "slow").touch()
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(load, gateway)
        while not changes(gateway, "all"):
            threading.Event().wait(0.01)
        assert gateway.chat(model="all", control="one").status_code == 200
        assert not loading.done()
        assert loading.result(10).status_code == 200


def test_clients_have_no_other_way_to_a_workers_own_endpoints(gateway, root):
    """Whatever they write as the path."""
    body = {"model": "all", "control_name": "late", "control_path": str(root / "pack")}
    for path in ("/v1/load_control/", "//v1/load_control", "/v1//load_control", "/v1/x/../load_control"):
        gateway.client.post(path, json=body, headers=gateway.replica("all").upstream.admin_headers)
    assert changes(gateway, "all") == []


def test_metrics_may_need_a_key(start, monkeypatch):
    monkeypatch.setenv("TRIMTAB_API_KEYS", "user")
    assert start().client.get("/metrics").status_code == 200
    gateway = start(protect_metrics=True)
    assert gateway.client.get("/metrics").status_code == 401
    assert gateway.client.get("/metrics", headers={"authorization": "Bearer user"}).status_code == 200
    assert gateway.client.get("/metrics", headers=ADMIN).status_code == 200
