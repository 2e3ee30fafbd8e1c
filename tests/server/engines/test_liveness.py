"""ModelPool that hang are started again; replicas that are busy are not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time

import openai
import pytest

from processes import lives
from served import Served, ask, paused, served
from trimtab_server.config.schema import load_settings
from trimtab_server.config.types import SettingsError
from trimtab_server.engines import liveness
from trimtab_server.engines.liveness import Liveness
from trimtab_server.engines.replica import Cause
from trimtab_server.errors import ReplicaTimeoutError

RESTARTS = "trimtab_gateway_worker_restarts_total"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """One gateway for all tests. The replica of `m` has a child, as vLLM's front end has an engine."""
    config = {
        "models": {"m": {"env": {"FAKE_CHILD": "1"}}, "other": {}},
        "timeouts": {"unresponsive": 3, "probe": 2},
        "restarts": {"attempts": 20, "backoff": 0.05},
    }
    with served(tmp_path_factory.mktemp("liveness"), **config) as gateway:
        yield gateway.wait_until_ready()
        assert gateway.stop() == 0
        gateway.assert_nothing_is_left()


def hang(gateway: Served, how: str) -> int:
    """Make the replica of `m` hang; returns its process."""
    pid = gateway.newest("m")
    if how == "front end":
        os.kill(pid, signal.SIGSTOP)
    elif how == "all":
        # The launcher's too, which is to end them.
        os.killpg(os.getpgid(pid), signal.SIGSTOP)
    else:
        ask(gateway.client(), extra_body={"fake": {"engine": "hangs"}})
    return pid


def family(gateway: Served) -> list[int]:
    """The processes of the replica of `m`: those of its group but for the launcher."""
    group = os.getpgid(gateway.newest("m"))
    return [pid for pid in gateway.children if lives(pid) and os.getpgid(pid) == group]


def restarts(gateway: Served, model: str = "m") -> dict[str, float]:
    """The restarts of a model's replica by their cause."""
    samples = gateway.samples()
    return {
        cause: samples[RESTARTS, ("cause", cause), ("model_name", model), ("replica", "0")] for cause in Cause
    }


@contextlib.contextmanager
def restarted(gateway: Served):
    """Within the block the replica of `m` hangs; after it, another has taken its place."""
    before, pid = restarts(gateway), gateway.newest("m")
    yield
    gateway.wait_for(lambda: gateway.newest("m") != pid, 60)
    gateway.wait_for(lambda: gateway.model()["state"] == "ready", 60)
    assert not lives(pid)
    assert restarts(gateway) == {**before, "unresponsive": before["unresponsive"] + 1}


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("front end", "gave no answer within 2 s (timeouts.probe)"),
        ("engine", "its engine neither answers nor computes"),
        ("all", "gave no answer within 2 s (timeouts.probe)"),
    ],
)
def test_a_worker_that_hangs_is_started_again_and_nobody_else_notices(gateway, how, fault):
    stream = ask(gateway.client(), "other", stream=True, extra_body=paused(2, tokens=12))
    processes = family(gateway)
    assert len(processes) == 2
    with restarted(gateway):
        hang(gateway, how)
    assert ask(gateway.client()).system_fingerprint == str(gateway.newest("m"))
    assert len(list(stream)) == 12
    assert sum(restarts(gateway, "other").values()) == 0
    told = "model m: its replica hung: no sign of life for 3 s (timeouts.unresponsive): "
    assert fault in gateway.log.rpartition(told)[2]
    assert not any(map(lives, processes))


@pytest.mark.parametrize("how", ["front end", "engine"])
def test_what_a_worker_that_hangs_had_under_way_ends_with_an_error_that_says_so(gateway, how):
    def answer() -> None:
        with pytest.raises(openai.APIStatusError) as broken:
            ask(gateway.client(), extra_body={"fake": {"delay": 100}})
        failures.append(broken.value)

    failures: list[openai.APIStatusError] = []
    arrived = len(gateway.seen("m")["requests"]) + 2
    with restarted(gateway):
        waiting = threading.Thread(target=answer)
        waiting.start()
        stream = ask(gateway.client(), stream=True, extra_body=paused(100))
        next(stream)
        gateway.wait_for(lambda: len(gateway.seen("m")["requests"]) == arrived)
        hang(gateway, how)
        with pytest.raises(openai.APIError, match="The replica of 'm' hung and is started again: "):
            list(stream)
        waiting.join(10)
    (failure,) = failures
    assert (failure.status_code, failure.code) == (502, "worker_failed")
    assert "hung and is started again: " in failure.message


def test_a_worker_whose_engine_computes_is_left_alone(gateway):
    ask(gateway.client(), extra_body={"fake": {"engine": "computes"}})
    pid = gateway.newest("m")
    time.sleep(12)  # four times `timeouts.unresponsive`
    assert gateway.model()["state"] == "ready"
    assert ask(gateway.client(), extra_body={"fake": {"engine": "answers"}}).system_fingerprint == str(pid)


# The setting


@pytest.mark.parametrize(
    ("written", "meant"), [("off", None), (False, None), (None, None), (12, 12), (0.5, 0.5)]
)
def test_how_long_may_be_off(write_config, written, meant):
    config = {"models": {"m": {"model": "org/name"}}, "timeouts": {"unresponsive": written}}
    assert load_settings(write_config(config)).timeouts.unresponsive == meant


@pytest.mark.parametrize("written", [0, -1, "on", True, float("inf")])
def test_how_long_is_a_number_above_zero(write_config, written):
    config = {"models": {"m": {"model": "org/name"}}, "timeouts": {"unresponsive": written}}
    with pytest.raises(SettingsError, match=r"timeouts\.unresponsive"):
        load_settings(write_config(config))


def test_the_environment_can_turn_it_off(write_config, monkeypatch):
    monkeypatch.setenv("TRIMTAB_TIMEOUTS__UNRESPONSIVE", "off")
    path = write_config({"models": {"m": {"model": "org/name"}}})
    assert load_settings(path).timeouts.unresponsive is None


# What a look sees


class Replica:
    """A replica's answers, and the time, in which a look takes a second."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        self.health = 200
        self.engine: object = {"answers": True}
        self.engine_status = 200
        monkeypatch.setattr(liveness.time, "monotonic", lambda: self.now)
        self.liveness = Liveness(self)

    async def get(self, path: str) -> tuple[int, bytes]:
        if self.health is None:
            raise ReplicaTimeoutError("it is silent")
        if path == "/health":
            self.now += 1
            return self.health, b""
        return self.engine_status, json.dumps(self.engine).encode()

    def look(self, times: int = 1, every: float = 3) -> str:
        for _ in range(times):
            self.now += every
            asyncio.run(self.liveness.look())
        return self.liveness.fault


@pytest.fixture
def replica(monkeypatch):
    return Replica(monkeypatch)


def test_silence_counts_from_the_last_sign_of_life(replica):
    replica.look()
    replica.health = 503
    assert replica.look(4, every=2) == "/health answers with status 503"
    assert replica.liveness.silent_for(12)
    assert not replica.liveness.silent_for(12.1)
    replica.health = 200
    assert replica.look() == ""
    assert not replica.liveness.silent_for(0)


def test_one_late_look_of_a_gateway_that_was_held_up_says_nothing(replica):
    replica.health = 503
    replica.look(2, every=10_000)
    assert not replica.liveness.silent_for(1)
    replica.look()
    assert replica.liveness.silent_for(1)


@pytest.mark.parametrize("busy", [0.25, 1, 1.01, None])
def test_an_engine_that_is_busy_lives_however_long_its_step_is(replica, busy):
    """So does one of which the kernel tells nothing."""
    replica.engine = {"answers": False, "busy": busy}
    assert replica.look(200) == ""


@pytest.mark.parametrize("busy", [0, 0.2])
def test_an_engine_at_rest_that_does_not_answer_hangs(replica, busy):
    replica.engine = {"answers": False, "busy": busy}
    assert replica.look(10) == "its engine neither answers nor computes"
    assert replica.liveness.silent_for(30)
    assert replica.liveness.in_doubt


@pytest.mark.parametrize(
    ("status", "engine"),
    [(404, {}), (202, {"answers": False, "busy": 0}), (200, []), (200, {"answers": False})],
)
def test_a_worker_that_can_not_tell_of_its_engine_lives_by_its_health_alone(replica, status, engine):
    replica.engine_status, replica.engine = status, engine
    assert replica.look(20) == ""


def test_a_worker_in_doubt_is_made_known_and_one_that_hangs_ends_the_watch(replica, monkeypatch):
    """Doubt is said of it at half a minute, the end comes at the limit."""

    async def sleep(seconds: float) -> None:
        replica.now += seconds

    monkeypatch.setattr(liveness.asyncio, "sleep", sleep)
    replica.engine = {"answers": False, "busy": 0}
    doubts: list[tuple[float, str]] = []
    asyncio.run(replica.liveness.wait_until_hung(60, lambda fault: doubts.append((replica.now, fault))))
    assert doubts[0] == (1032, "its engine neither answers nor computes")
    assert replica.now == 1060
