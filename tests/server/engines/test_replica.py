"""Several replicas of one model, as processes: here, and elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal

import openai
import pytest

from served import Remote, Served, ask, paused

TWO = {"replicas": [{}, {}]}


def replicas_of(gateway: Served, model: str = "m") -> list[tuple[str, str | None]]:
    """State and reason of each, as `/ready` says them."""
    return [(replica["state"], replica["reason"]) for replica in gateway.model(model)["replicas"]]


def states_of(gateway: Served, model: str = "m") -> list[str]:
    return [state for state, _ in replicas_of(gateway, model)]


def wait_for_states(gateway: Served, *states: str) -> None:
    gateway.wait_for(lambda: states_of(gateway) == list(states), seconds=60)


def asked(gateway: Served, **options) -> int:
    """The process that answers a request."""
    return int(ask(gateway.client(), **options).system_fingerprint)


@pytest.fixture
def remote():
    """Start a replica elsewhere."""
    with contextlib.ExitStack() as stack:

        def remote(**options) -> Remote:
            started = Remote(**options)
            stack.callback(started.close)
            return started

        yield remote


# Here


def test_replicas_share_the_load_and_the_busy_one_is_passed_over(serve):
    gateway = serve(models={"m": TWO})
    wait_for_states(gateway, "ready", "ready")
    both = {gateway.newest("m~0"), gateway.newest("m~1")}
    assert {asked(gateway) for _ in range(2)} == both
    streams = [ask(gateway.client(), stream=True, extra_body=paused(60)) for _ in range(2)]
    pids = [int(next(stream).system_fingerprint) for stream in streams]
    assert set(pids) == both
    streams[0].close()
    gateway.wait_for(lambda: outstanding(gateway) == [0, 1] or outstanding(gateway) == [1, 0])
    assert {asked(gateway) for _ in range(4)} == {pids[0]}
    streams[1].close()


def outstanding(gateway: Served) -> list[float]:
    samples = gateway.samples()
    name = "trimtab_gateway_worker_requests"
    return [samples[name, ("model_name", "m"), ("replica", str(i))] for i in range(2)]


def test_when_a_replica_dies_under_load_only_what_it_had_fails_and_it_comes_back(serve):
    gateway = serve(models={"m": TWO}, restarts={"backoff": 2})
    wait_for_states(gateway, "ready", "ready")
    victim = gateway.newest("m~0")
    streams = [ask(gateway.client(), stream=True, extra_body=paused(0.5)) for _ in range(6)]
    pids = [int(next(stream).system_fingerprint) for stream in streams]
    assert pids.count(victim) == 3
    os.kill(victim, signal.SIGKILL)
    assert victim not in {asked(gateway) for _ in range(6)}
    gateway.wait_for(lambda: replicas_of(gateway)[0] == ("restarting", "ended with status 137"))
    assert gateway.get("/ready")[0] == 200
    for pid, stream in zip(pids, streams, strict=True):
        with pytest.raises(openai.APIError, match="broke off") if pid == victim else contextlib.nullcontext():
            assert len(list(stream)) == 2
    wait_for_states(gateway, "ready", "ready")
    assert {asked(gateway) for _ in range(2)} == {gateway.newest("m~0"), gateway.newest("m~1")}
    samples = gateway.samples()
    restarts = "trimtab_gateway_worker_restarts_total"
    assert samples[restarts, ("cause", "ended"), ("model_name", "m"), ("replica", "0")] == 1
    assert samples[restarts, ("cause", "ended"), ("model_name", "m"), ("replica", "1")] == 0
    assert gateway.stop() == 0
    gateway.assert_nothing_is_left()


def test_their_metrics_are_told_apart_and_those_of_a_model_with_one_are_as_they_were(serve):
    gateway = serve(models={"m": TWO, "single": {}}).wait_until_ready()
    wait_for_states(gateway, "ready", "ready")
    samples = gateway.samples()
    tokens = "vllm:prompt_tokens_total", ("engine", "0")
    for index in "01":
        assert samples[*tokens, ("model_name", "m"), ("replica", index)] == 7
        assert samples["trimtab_gateway_worker_up", ("model_name", "m"), ("replica", index)] == 1
    assert samples[*tokens, ("model_name", "single")] == 7


def test_their_output_has_a_file_each_and_their_sockets_are_for_nobody_else(serve, tmp_path):
    gateway = serve(models={"m": TWO})
    wait_for_states(gateway, "ready", "ready")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        f"{gateway.port}-m~{i}.log" for i in range(2)
    }
    (directory,) = gateway.leftovers
    sockets = [directory / str(i) / "http" for i in range(2)]
    assert [socket.stat().st_mode & 0o777 for socket in sockets] == [0o600] * 2


# Elsewhere


def test_a_worker_elsewhere_gets_its_key_and_nothing_that_is_the_gateways(serve, remote, monkeypatch):
    monkeypatch.setenv("ELSEWHERE", "a-secret")
    monkeypatch.setenv("TRIMTAB_API_KEYS", "ours")
    replica = remote(key="a-secret")
    gateway = serve(models={"m": {"replicas": [{"url": replica.url + "/", "key_variable": "ELSEWHERE"}]}})
    gateway.wait_until_ready()
    assert ask(gateway.client(api_key="ours")).system_fingerprint == str(replica.process.pid)
    headers = {name.lower(): value for name, value in replica.seen()["requests"][-1]["headers"].items()}
    assert headers["authorization"] == "Bearer a-secret"
    assert headers["host"] == f"127.0.0.1:{replica.port}"
    assert "a-secret" not in gateway.log
    assert gateway.children == []
    assert gateway.stop() == 0
    assert replica.process.poll() is None


def test_a_worker_elsewhere_that_goes_away_is_passed_over_until_it_is_back(serve, remote):
    replica = remote()
    gateway = serve(models={"m": {"replicas": [{"url": replica.url}, {}]}})
    wait_for_states(gateway, "ready", "ready")
    here = gateway.newest("m~1")
    assert {asked(gateway) for _ in range(2)} == {replica.process.pid, here}
    replica.close()
    assert {asked(gateway) for _ in range(4)} == {here}
    assert replicas_of(gateway)[0] == ("unresponsive", "The replica of 'm' does not listen.")
    replica.start()
    wait_for_states(gateway, "ready", "ready")
    assert {asked(gateway) for _ in range(2)} == {replica.process.pid, here}


def test_without_any_the_model_is_503_and_the_gateway_goes_on_asking(serve, remote):
    replica = remote()
    replica.close()
    gateway = serve(models={"m": {"replicas": [{"url": replica.url}]}})
    wait_for_states(gateway, "unresponsive")
    with pytest.raises(openai.InternalServerError, match="it is unresponsive") as down:
        ask(gateway.client())
    assert (down.value.status_code, down.value.response.headers["retry-after"]) == (503, "5")
    replica.start()
    gateway.wait_until_ready()
    assert asked(gateway) == replica.process.pid


def test_a_worker_elsewhere_with_the_controls_that_are_offered_takes_them(serve, remote, pack):
    replica = remote(controls=["one", "more"])
    gateway = serve(models={"m": {"replicas": [{"url": replica.url}]}}, controls={"one": str(pack)})
    gateway.wait_until_ready()
    ask(gateway.client(), extra_body={"control": "one"})
    assert replica.seen()["requests"][-1]["body"]["vllm_xargs"]["trimtab_control"] == "one"


def test_a_worker_elsewhere_that_is_controlled_by_nobody_needs_no_plugin(serve, remote):
    replica = remote()
    gateway = serve(models={"m": {"replicas": [{"url": replica.url}]}}).wait_until_ready()
    assert asked(gateway) == replica.process.pid


def test_a_client_that_goes_away_ends_its_request_elsewhere_too(serve, remote):
    replica = remote()
    gateway = serve(models={"m": {"replicas": [{"url": replica.url}]}}).wait_until_ready()
    stream = ask(gateway.client(), stream=True, extra_body=paused(60))
    next(stream)
    stream.close()
    gateway.wait_for(lambda: replica.seen()["aborted"] == 1, seconds=3)
