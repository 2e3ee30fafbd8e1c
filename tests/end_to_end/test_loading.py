"""Controls that are loaded into a running engine, and unloaded, with other requests under way."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

import tiny
from engines import HOT, V1, V2, Engine, engine
from reference import Model, PathReference, Reference, SegmentedPath
from serving import gateway
from tiny import sentences

pytestmark = pytest.mark.engine

KEY = "the admin's"
TOKENS = 24
COPIES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The directory below which controls may be loaded."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", params=[(V1, 1), (V1, 2), (V2, 1)], ids=["v1", "v1-two-ranks", "v2"])
def layout(request):
    """The model runner of vLLM, and its ranks."""
    return request.param


@pytest.fixture(scope="module")
def server(layout, family, tmp_path_factory, root):
    runner, ranks = layout
    directory = tmp_path_factory.mktemp("engine")
    plugin = {
        "controls": {"first": str(family.control)},
        "tables": str(directory),
        "control_roots": [str(root)],
    }
    args = (*HOT, "--max-model-len", str(tiny.CONTEXT), "--max-num-seqs", str(2 * COPIES))
    args += ("--tensor-parallel-size", str(ranks))
    cores = "|".join(map(str, range(ranks)))
    with engine(
        family.b,
        directory,
        *args,
        plugin=plugin,
        runner=runner,
        cores=cores,
        variables={"TRIMTAB_ADMIN_KEYS": f"other, {KEY}"},
    ) as running:
        yield running


@pytest.fixture
def place(family, root):
    """A pack that may be loaded."""
    place = root / "pack"
    shutil.copytree(family.control, place, dirs_exist_ok=True)
    yield place
    shutil.rmtree(place)


def call(server: Engine, path: str, body: dict | None = None, key: str = KEY) -> tuple[int, dict]:
    headers = {"content-type": "application/json", "x-trimtab-admin-key": key}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def load(server: Engine, name: str, place: Path | str, **options) -> tuple[int, dict]:
    return call(server, "/v1/load_control", {"control_name": name, "control_path": str(place)}, **options)


def unload(server: Engine, name: str, **options) -> tuple[int, dict]:
    return call(server, "/v1/unload_control", {"control_name": name}, **options)


def names(server: Engine) -> list[str]:
    return [control["id"] for control in call(server, "/v1/controls")[1]["data"]]


@pytest.fixture(scope="module")
def api(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def complete(api: OpenAI, family, control: str | None, copies: int = 1, **options):
    prompt = Model(family.b).tokenizer.encode(next(iter(sentences(1, seed=4))))
    xargs = {"trimtab_control": control, "trimtab_prompt": [5, 6, 7]} if control else {}
    extra = {"vllm_xargs": xargs, "return_token_ids": True, "ignore_eos": True}
    options = {"max_tokens": TOKENS, "temperature": 0, **options}
    return api.completions.create(model="m", prompt=[prompt] * copies, extra_body=extra, **options)


@cache
def reference_of(target: Path, control: Path, runner: str) -> Reference:
    kind = PathReference if runner == V1 else SegmentedPath
    return kind(Model(target), Model(control), window=tiny.CONTEXT)


def follows(family, layout, output: list[int], strength: float = 1.0) -> bool:
    """Whether each token is the slow reference's, but for ties."""
    reference = reference_of(family.b, family.control, layout[0])
    prompt = reference.target.tokenizer.encode(next(iter(sentences(1, seed=4))))
    steps = reference.steps(prompt, [5, 6, 7], strength, output)
    return all(step.token == token or step.gap < 1e-4 for step, token in zip(steps, output, strict=True))


def test_a_loaded_control_steers_as_one_that_was_there_from_the_start(api, family, layout, server, place):
    assert load(server, "late", place) == (200, {"status": "loaded", "control_name": "late"})
    assert names(server) == ["first", "late"]
    output = complete(api, family, "late").choices[0].token_ids
    assert follows(family, layout, output)
    assert output == complete(api, family, "first").choices[0].token_ids
    assert output != complete(api, family, None).choices[0].token_ids
    assert unload(server, "late") == (200, {"status": "unloaded", "control_name": "late"})
    assert names(server) == ["first"]
    with pytest.raises(BadRequestError, match="no control 'late' here, there is: first"):
        complete(api, family, "late")


def test_requests_under_way_see_nothing_of_controls_that_come_and_go(api, family, layout, server, place):
    """And one whose own control goes keeps it to its end; on V2 it continues without."""
    outputs = {name: [[] for _ in range(COPIES)] for name in ("first", "brief")}
    begun = {name: threading.Event() for name in outputs}
    longest = (tiny.CONTEXT if layout[0] == V1 else tiny.CONTEXT // 2) - 32  # V2's kernels are interpreted

    def generate(control: str) -> None:
        options = {"copies": COPIES, "max_tokens": longest, "stream": True}
        for chunk in complete(api, family, control, **options):
            for choice in chunk.choices:
                outputs[control][choice.index] += choice.token_ids or []
            begun[control].set()

    assert load(server, "brief", place)[0] == 200
    threads = [threading.Thread(target=generate, args=(name,)) for name in outputs]
    for thread in threads:
        thread.start()
    assert begun["brief"].wait(60)
    # once unloaded, the name is refused: the requests that have it are those that began before
    assert unload(server, "brief")[0] == 200
    assert max(map(len, outputs["brief"])) < longest
    changes = 0
    while any(thread.is_alive() for thread in threads):
        assert load(server, "other", place)[0] == 200
        assert unload(server, "other")[0] == 200
        changes += 1
    assert changes
    for control, of_control in outputs.items():
        for output in of_control:
            assert len(output) == longest
            if control == "first" or layout[0] == V1:
                assert follows(family, layout, output)


def test_only_who_has_an_admin_key_may_load(server, place):
    for key in ("wrong", ""):
        assert load(server, "late", place, key=key)[0] == 403
        assert unload(server, "first", key=key)[0] == 403
    assert names(server) == ["first"]


def test_names_are_taken_once_and_known(server, place):
    assert load(server, "first", place)[0] == 409
    assert unload(server, "nobody")[0] == 404
    assert load(server, "../x", place)[0] == 400


def test_what_leads_out_of_the_roots_is_refused(family, server, root, place):
    outside = str(family.control)
    (root / "link").symlink_to(outside)
    (place / "extra.safetensors").symlink_to(family.control / "model.safetensors")
    for wanted in (
        outside,
        root / "link",
        f"{root}/../{family.control.name}",
        place,
        "org/name",
        root / "no",
    ):
        status, body = load(server, "late", wanted)
        assert status == 400, wanted
        assert body["error"]["message"].startswith("control_path: "), wanted
    (root / "link").unlink()
    (place / "trimtab.json").write_text(json.dumps({"components": [{"model": "org/name"}]}))
    (place / "extra.safetensors").unlink()
    assert "its component 'org/name' is no directory" in load(server, "late", place)[1]["error"]["message"]
    assert names(server) == ["first"]


def test_a_pack_that_can_not_be_loaded_costs_nobody_anything(api, family, server, place):
    """What is wrong with it is said; the name is free for a better one."""
    weights = place / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    status, body = load(server, "late", place)
    assert (status, bool(body["error"]["message"])) == (400, True)
    weights.write_bytes(good)
    assert load(server, "late", place)[0] == 200
    assert unload(server, "late")[0] == 200
    assert complete(api, family, "first").choices[0].token_ids


def test_a_gateway_elsewhere_loads_into_this_server(family, server, place, tmp_path, monkeypatch):
    """It is a replica of a model of the gateway's, which checks it and has a key for it."""
    monkeypatch.setenv("THERE", KEY)
    (tmp_path / "admin-keys").write_text("the gateway's")
    config = {
        "controls": {"first": str(family.control)},
        "control_roots": [str(place.parent)],
        "admin_keys_file": str(tmp_path / "admin-keys"),
        "tables": str(tmp_path),
        "models": {"m": {"replicas": [{"url": server.url, "admin_key_variable": "THERE"}]}},
    }
    with gateway(tmp_path, config) as url, OpenAI(base_url=f"{url}/v1", api_key="the gateway's") as api:

        def text(control) -> str:
            options = {"model": "m", "prompt": "Bo said", "max_tokens": TOKENS, "temperature": 0}
            return api.completions.create(**options, extra_body={"control": control}).choices[0].text

        body = {"control_name": "late", "control_path": str(place)}
        api.post("/load_control", body=body, cast_to=object)
        assert names(server) == ["first", "late"]
        assert text("late") == text("first") != text(False)
        api.post("/unload_control", body={"control_name": "late"}, cast_to=object)
        assert names(server) == ["first"]
