"""How many requests of a model there may be at once, in a gateway that is a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading

import openai
import pytest

from served import CHAT, Served, ask, paused

LIMITS = {"concurrent": 2, "queued": 2}


@pytest.fixture
def gateway(serve) -> Served:
    return serve(models={"m": {}, "other": {}}, limits=LIMITS).wait_until_ready()


@pytest.fixture
def full(gateway):
    """All that the model takes at once."""
    with contextlib.ExitStack() as stack:
        streams = [ask(gateway.client(), stream=True, extra_body=paused(60)) for _ in range(2)]
        for stream in streams:
            stack.callback(stream.close)
            next(stream)
        yield streams


class Asking(threading.Thread):
    """A request that waits for its turn; `user` says whose it is."""

    def __init__(self, gateway: Served, user: str, **options) -> None:
        super().__init__(daemon=True)
        self.answer = None
        self.error: openai.APIStatusError | None = None
        self._gateway, self._user, self._options = gateway, user, options
        self.start()

    def run(self) -> None:
        try:
            self.answer = ask(self._gateway.client(), user=self._user, **self._options)
        except openai.APIStatusError as error:
            self.error = error
        except openai.APIConnectionError:  # the end of the test
            pass


def queued(gateway: Served, model: str = "m") -> float:
    return gateway.samples()["trimtab_gateway_requests_queued", ("model_name", model)]


def line_up(gateway: Served, *users: str, **options) -> list[Asking]:
    """Let these requests join the line, one after the other."""
    asking = []
    for i, user in enumerate(users):
        asking.append(Asking(gateway, user, **options))
        gateway.wait_for(lambda there=i + 1: queued(gateway) == there)
    return asking


def users(gateway: Served) -> list[str]:
    """Whose requests the replica has been sent, but for those that fill it."""
    return [r["body"]["user"] for r in gateway.seen("m")["requests"] if "user" in r["body"]]


def test_what_is_too_much_waits_and_goes_in_its_order(gateway, full):
    first, second = line_up(gateway, "first", "second", extra_body={"fake": {"delay": 0.2}})
    assert users(gateway) == []
    assert gateway.samples()["trimtab_gateway_requests_in_flight", ("model_name", "m")] == 4
    full[0].close()
    for asking in (first, second):
        asking.join(10)
        assert asking.answer.choices
    assert users(gateway) == ["first", "second"]
    assert queued(gateway) == 0


def test_beyond_the_line_it_is_429_with_a_time_to_come_back(gateway, full):
    line_up(gateway, "first", "second")
    with pytest.raises(openai.RateLimitError, match="2 queued") as refused:
        ask(gateway.client(), "m")
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert refused.value.body == {
        "message": refused.value.body["message"],
        "param": "model",
        "type": "requests",
        "code": "rate_limit_exceeded",
    }


def test_no_other_model_and_no_other_endpoint_is_touched_by_it(gateway, full):
    line_up(gateway, "first", "second")
    assert ask(gateway.client(), "other").choices
    assert queued(gateway, "other") == 0
    # What does not generate is not counted.
    assert gateway.get("/version?model=m")[0] == 202
    assert [model.id for model in gateway.client().models.list()] == ["m", "other"]


def test_a_client_that_goes_away_leaves_the_line_and_never_reaches_the_worker(gateway, full):
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    body = json.dumps({"model": "m", "messages": [], "user": "gone"})
    connection.request("POST", CHAT, body, {"content-type": "application/json"})
    gateway.wait_for(lambda: queued(gateway) == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    gateway.wait_for(lambda: queued(gateway) == 0, seconds=3)
    gateway.wait_for(lambda: "model=m control=- status=499" in gateway.log, seconds=3)
    (asking,) = line_up(gateway, "stays")
    full[0].close()
    asking.join(10)
    assert users(gateway) == ["stays"]


def test_a_place_is_given_back_however_a_request_ends(gateway):
    """More of them than there are places, one after the other."""
    for _ in range(4):
        with contextlib.suppress(openai.APIError):
            ask(gateway.client(), "m", extra_body={"fake": {"hang_up": "before"}})
        with contextlib.suppress(openai.APIError):
            list(ask(gateway.client(), "m", stream=True, extra_body={"fake": {"hang_up": "midway"}}))
        stream = ask(gateway.client(), "m", stream=True, extra_body=paused(60))
        next(stream)
        stream.close()
        gateway.wait_for(lambda: in_flight(gateway) == 0)
    assert ask(gateway.client(), "m", timeout=10).choices


def in_flight(gateway: Served) -> float:
    return gateway.samples()["trimtab_gateway_requests_in_flight", ("model_name", "m")]


def test_when_the_worker_dies_the_line_does_not_wait_for_ever(gateway, full):
    waiting = line_up(gateway, "first", "second")
    os.kill(gateway.newest("m"), signal.SIGKILL)
    for asking in waiting:
        asking.join(10)
        # 502 where the replica's socket still took a connection while its process ended.
        told = (asking.error.status_code, asking.error.code)
        assert told in ((503, "model_not_ready"), (502, "worker_failed"))
    gateway.wait_for(lambda: gateway.model("m")["state"] == "ready")
    assert ask(gateway.client(), "m").choices


def test_after_a_sigterm_the_line_is_served_within_the_drain(gateway, full):
    waiting = line_up(gateway, "first", "second")
    gateway.process.send_signal(signal.SIGTERM)
    for stream in full:
        stream.close()
    for asking in waiting:
        asking.join(10)
        assert asking.answer is not None
    assert gateway.process.wait(30) == 0
    gateway.assert_nothing_is_left()
