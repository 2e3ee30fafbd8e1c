"""Which replica of a model gets a request, and what happens before one may."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest

from served import FAKE, Remote
from trimtab_server.config.schema import load_settings
from trimtab_server.config.types import SettingsError
from trimtab_server.engines.pool import ModelPool
from trimtab_server.engines.replica import State
from trimtab_server.errors import ReplicaFailedError
from trimtab_server.metrics import Metrics

TWO = {"m": {"model": ".", "replicas": [{}, {}]}}


def counts(gateway, model="m"):
    return [len(gateway.asked(model, replica.id.index)) for replica in gateway.replicas[model].replicas]


# Which one


def test_of_equally_busy_workers_each_gets_a_request_in_turn(start):
    gateway = start(models={"m": {"model": ".", "replicas": [{}, {}, {}]}})
    for _ in range(6):
        assert gateway.chat().status_code == 200
    assert counts(gateway) == [2, 2, 2]


def test_the_worker_with_the_fewest_requests_gets_the_next(start):
    gateway = start(models=TWO)
    gateway.replica("m", 0).in_flight = 1
    for _ in range(3):
        gateway.chat()
    assert counts(gateway) == [0, 3]


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"fake": {"hang_up": "before"}}])
def test_a_request_is_outstanding_until_its_answer_has_ended_in_whatever_way(start, body):
    gateway = start()
    gateway.chat(**body)
    assert gateway.replica("m").in_flight == 0
    assert 'trimtab_gateway_worker_requests{model_name="m",replica="0"} 0.0' in metrics_of(gateway)


def metrics_of(gateway) -> str:
    return gateway.client.get("/metrics").text


@pytest.mark.parametrize("state", set(State) - {State.READY})
def test_only_a_worker_that_is_ready_gets_requests(start, state):
    gateway = start(models=TWO)
    gateway.replica("m", 0).state = state
    for _ in range(2):
        assert gateway.chat().status_code == 200
    assert counts(gateway) == [0, 2]


def test_when_none_is_ready_the_error_says_how_each_of_them_does(start):
    gateway = start(models=TWO)
    gateway.replica("m", 0).state = State.STARTING
    gateway.replica("m", 1).state = State.FAILED
    response = gateway.chat()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert "replica 0 is starting, replica 1 is failed" in gateway.error(response)["message"]


def test_a_model_is_as_ready_as_the_best_of_its_workers(start):
    gateway = start(models=TWO)
    gateway.replica("m", 0).state = State.RESTARTING
    gateway.replica("m", 0).reason = "ended with status 1"
    response = gateway.client.get("/ready")
    assert response.status_code == 200
    model = response.json()["models"]["m"]
    assert model["state"] == "ready"
    assert [(r["replica"], r["state"], r["reason"]) for r in model["replicas"]] == [
        ("0", "restarting", "ended with status 1"),
        ("1", "ready", None),
    ]


def test_a_model_of_several_workers_is_listed_once(start):
    gateway = start(models=TWO)
    assert [model["id"] for model in gateway.client.get("/v1/models").json()["data"]] == ["m"]


def test_a_request_that_could_not_be_connected_goes_to_another_worker(start):
    gateway = start(models=TWO)
    gateway.cut_off("m", 0)
    assert [gateway.chat().status_code for _ in range(4)] == [200] * 4
    assert counts(gateway) == [0, 4]
    assert gateway.replica("m", 0).state is State.UNRESPONSIVE
    assert "does not listen" in gateway.replica("m", 0).reason


def test_a_request_that_was_sent_is_never_repeated(start):
    gateway = start(models=TWO)
    assert gateway.chat(fake={"hang_up": "before"}).status_code == 502
    assert counts(gateway) == [1, 0]


def test_when_no_worker_takes_a_connection_it_is_503(start):
    gateway = start(models=TWO)
    for index in range(2):
        gateway.cut_off("m", index)
    assert gateway.chat().status_code == 503


# Before one is ready; these start processes


@pytest.fixture
def run(write_config):
    """Run `test(replicas)` with replicas that are processes; `on_ready` is awaited before one is ready."""

    def run(test, on_ready, models=None, **config):
        models = models or {"m": {"model": "x", "command": FAKE}}
        rules = {"restarts": {"backoff": 0.05, "attempts": 1}, "timeouts": {"stop": 1, "probe": 0.5}}
        settings = load_settings(write_config({"models": models, **rules, **config}))
        replicas = ModelPool(settings, Metrics())
        replicas.on_ready = on_ready

        async def main():
            async with replicas:
                await test(replicas)

        asyncio.run(main())

    return run


async def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def process_of(replica) -> int:
    line = replica._output.path.read_text().rsplit("fake server ", 1)[1]
    return int(line.split()[0])


def test_what_is_to_be_done_before_a_worker_is_ready_is_done_again_after_a_restart(run):
    states = []

    async def on_ready(upstream):
        assert await upstream.post_json("/v1/load", {"a": 1}, {"Authorization": "Bearer x"})
        states.append((upstream.model, replica.state))

    async def test(replicas):
        nonlocal replica
        (replica,) = replicas.all
        await until(lambda: replica.state is State.READY)
        os.kill(process_of(replica), signal.SIGKILL)
        await until(lambda: len(states) == 2)
        await until(lambda: replica.state is State.READY)

    replica = None
    run(test, on_ready)
    assert states == [("m", State.STARTING)] * 2


@pytest.mark.parametrize("error", [ReplicaFailedError("no room for it"), ZeroDivisionError("oh")])
def test_a_worker_for_which_it_can_not_be_done_is_started_again_and_given_up(run, error):
    async def on_ready(_):
        raise error

    async def test(replicas):
        (replica,) = replicas.all
        await until(lambda: replica.state is State.FAILED)
        assert "could not be made ready" in replica.reason
        assert ("no room for it" in replica.reason) == isinstance(error, ReplicaFailedError)
        assert "division" not in replica.reason

    run(test, on_ready)


def test_the_worker_is_told_in_json_and_its_answer_is_an_object(run):
    answers = []

    async def on_ready(upstream):
        answers.append(await upstream.post_json("/v1/load", {"a": [1]}, {"x-own": "y"}))
        with pytest.raises(ReplicaFailedError, match="/fake/text with status 200 and no JSON object"):
            await upstream.post_json("/fake/text", {})

    async def test(replicas):
        await until(lambda: replicas["m"].state is State.READY)

    run(test, on_ready)
    ((status, told),) = answers
    assert (status, told["body"]) == (202, '{"a": [1]}')
    assert (told["headers"]["content-type"], told["headers"]["x-own"]) == ("application/json", "y")


@pytest.mark.parametrize("here", [True, False])
def test_a_worker_that_fails_its_probes_again_and_again_gets_no_requests_until_it_answers(
    run, monkeypatch, here
):
    monkeypatch.setattr("trimtab_server.engines.replica._PROBE_SECONDS", 0.05)
    readied = []

    async def on_ready(upstream):
        readied.append(upstream.model)

    async def test(replicas):
        (replica,) = replicas.all
        await until(lambda: replica.state is State.READY)
        pid = process_of(replica) if here else remote.process.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: replica.state is State.UNRESPONSIVE)
        assert "0.5 s (timeouts.probe)" in replica.reason
        os.kill(pid, signal.SIGCONT)
        await until(lambda: replica.state is State.READY)
        assert replica.reason == ""

    with contextlib.closing(Remote()) as remote:
        run(test, on_ready, None if here else {"m": {"replicas": [{"url": remote.url}]}})
    assert readied == ["m", "m"]


def test_a_worker_elsewhere_that_was_started_again_between_two_probes_is_made_ready_again(
    run, monkeypatch, pack
):
    monkeypatch.setattr("trimtab_server.engines.replica._PROBE_SECONDS", 5)
    readied = []

    async def on_ready(upstream):
        readied.append(replica.state)

    async def test(replicas):
        nonlocal replica
        (replica,) = replicas.all
        await until(lambda: replica.state is State.READY)
        remote.close()
        await asyncio.to_thread(remote.start)
        assert replica.state is State.READY  # nothing was noticed
        await until(lambda: len(readied) == 2, seconds=60)
        await until(lambda: replica.state is State.READY)

    replica = None
    with contextlib.closing(Remote(controls=["one"])) as remote:
        run(test, on_ready, {"m": {"replicas": [{"url": remote.url}]}}, controls={"one": str(pack)})
    assert readied == [State.STARTING] * 2


def test_of_several_servers_behind_one_address_each_is_made_ready_once(run, monkeypatch, pack):
    monkeypatch.setattr("trimtab_server.engines.replica._PROBE_SECONDS", 0.05)
    readied = []

    async def on_ready(upstream):
        readied.append(upstream.model)

    async def test(replicas):
        (replica,) = replicas.all
        await until(lambda: len(readied) == 2, seconds=60)
        await asyncio.sleep(2)  # up to 40 probes, of which each server gets half
        await until(lambda: replica.state is State.READY)

    with (
        contextlib.closing(Remote(controls=["one"])) as first,
        contextlib.closing(Remote(controls=["one"], port=first.port)),
    ):
        run(test, on_ready, {"m": {"replicas": [{"url": first.url}]}}, controls={"one": str(pack)})
    assert readied == ["m"] * 2


@pytest.mark.parametrize("roots", [[], ["."]])
def test_a_worker_elsewhere_without_the_plugin_is_ready_where_no_control_is_offered(run, roots):
    async def on_ready(_):
        pass

    async def test(replicas):
        (replica,) = replicas.all
        await until(lambda: replica.state is State.READY)

    with contextlib.closing(Remote()) as remote:
        run(test, on_ready, {"m": {"replicas": [{"url": remote.url}]}}, control_roots=roots)


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({"name": "other"}, "it has no model 'm'; it has 'other'"),
        ({"controls": ["two"]}, "it lacks controls that are offered: 'one'; it has 'two'"),
        ({}, "/v1/controls answers with status 404: it runs without Trimtab's plugin"),
        ({"controls": ["one"], "key": "k"}, "/v1/models answers with status 401: it wants another key"),
    ],
)
def test_a_worker_elsewhere_that_can_not_serve_what_is_offered_is_unfit_and_says_why(
    run, pack, caplog, there, reason
):
    readied = []

    async def on_ready(upstream):
        readied.append(upstream)

    async def test(replicas):
        (replica,) = replicas.all
        await until(lambda: replica.state is State.MISCONFIGURED)
        assert replica.reason.startswith(reason)
        assert f"model m: unfit: {reason}" in caplog.text

    with contextlib.closing(Remote(**there)) as remote:
        run(test, on_ready, {"m": {"replicas": [{"url": remote.url}]}}, controls={"one": str(pack)})
    assert readied == []


def test_a_key_that_the_environment_does_not_have_is_said_before_anything_starts(write_config):
    replicas = [{"url": "http://elsewhere", "key_variable": "NOT_THERE"}]
    settings = load_settings(write_config({"models": {"m": {"replicas": replicas}}}))
    with pytest.raises(SettingsError, match=r"models\.m\.replicas\.0\.key_variable: .* NOT_THERE"):
        ModelPool(settings, Metrics())
