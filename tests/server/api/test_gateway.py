"""The gateway as a process on a real socket, its replicas real processes that fail when they are told to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from processes import lives, parent_of
from served import CHAT, Served, ask, paused, served
from trimtab_server.config.sections import Restarts


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, pack):
    """One gateway for all tests that do not end it: a model `plain`, and `steered` with a default control."""
    config = {
        "models": {"plain": {"env": {"FAKE_CHILD": 1}}, "steered": {"default_control": "one"}},
        "controls": {"one": str(pack)},
        "restarts": {"attempts": 20, "backoff": 0.05},
    }
    with served(tmp_path_factory.mktemp("gateway"), **config) as gateway:
        yield gateway.wait_until_ready()


# Connections


def closed_after(served: Served, seconds: float) -> bool:
    """Whether an idle connection, which has had an answer, is closed by the gateway within `seconds`."""
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(30)
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(65536)
        connection.settimeout(seconds)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False


def test_an_idle_connection_stays_open_for_longer_than_uvicorns_5_seconds(gateway):
    assert not closed_after(gateway, 6.5)


def test_an_idle_connection_is_closed_when_the_configured_time_is_over(serve):
    gateway = serve(timeouts={"keep_alive": 1})
    gateway.wait_until_ready()
    assert not closed_after(gateway, 0.6)
    assert closed_after(gateway, 5)


# With the OpenAI SDK


def test_the_sdk_chats_with_a_model(gateway):
    assert ask(gateway.client(), "plain").choices[0].message.content == "one two"


def test_the_sdk_asks_for_a_control_and_learns_what_was_applied(gateway):
    client = gateway.client()
    options = {"model": "plain", "messages": [{"role": "user", "content": "hi"}]}
    wanted = {"control": {"name": "one", "strength": 0.25}}
    response = client.chat.completions.with_raw_response.create(**options, extra_body=wanted)
    assert response.headers["x-trimtab-control"] == "one=0.25"
    xargs = gateway.seen("plain")["requests"][-1]["body"]["vllm_xargs"]
    assert (xargs["trimtab_control"], xargs["trimtab_strength"]) == ("one", 0.25)


def test_a_stream_says_its_control_and_arrives_piece_by_piece(gateway):
    with gateway.client().chat.completions.with_streaming_response.create(
        model="steered", messages=[{"role": "user", "content": "hi"}], stream=True, extra_body=paused(0.15)
    ) as response:
        assert response.headers["x-trimtab-control"] == "one=0.5"
        times = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    assert len(times) == 3
    assert times[2] - times[0] > 0.2


def test_the_sdk_lists_the_models(gateway):
    listed = [model.id for model in gateway.client().models.list()]
    assert listed == ["plain", "steered", "plain:one", "steered:one"]


def test_errors_are_those_that_the_sdk_knows(gateway):
    with pytest.raises(openai.NotFoundError) as missing:
        ask(gateway.client(), "other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(gateway.client(), "plain", extra_body={"control": "other"})
    assert unknown.value.param == "control"


def test_many_requests_at_once_each_get_their_answer(gateway):
    results: list[str] = []
    client = gateway.client()
    threads = [
        threading.Thread(target=lambda: results.append(ask(client, "steered").choices[0].message.content))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["one two"] * 40


# Clients that go away


@pytest.mark.parametrize("body", [{"fake": {"delay": 60}}, {"stream": True, "fake": {"pause": 60}}])
def test_a_client_that_goes_away_ends_its_request_at_the_worker_at_once(gateway, body):
    before = gateway.seen("plain")
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    content = json.dumps({"model": "plain", "messages": [], **body})
    connection.request("POST", CHAT, content, {"content-type": "application/json"})
    if body.get("stream"):
        assert connection.getresponse().read(5) == b"data:"
    arrived = len(before["requests"]) + 1
    gateway.wait_for(lambda: len(gateway.seen("plain")["requests"]) == arrived)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    gateway.wait_for(lambda: gateway.seen("plain")["aborted"] == before["aborted"] + 1, seconds=3)
    gateway.wait_for(lambda: "model=plain control=- status=499" in gateway.log, seconds=3)


# ModelPool that die


@contextlib.contextmanager
def restarted(gateway: Served, model: str):
    """Within the block the model's replica ends; after it, another has taken its place."""
    before = gateway.model(model)["restarts"]
    yield
    gateway.wait_for(lambda: gateway.model(model)["restarts"] == before + 1)
    gateway.wait_for(lambda: gateway.model(model)["state"] == "ready")


def test_a_worker_that_dies_is_started_again_and_the_request_it_had_fails(gateway):
    with restarted(gateway, "plain"):
        with pytest.raises(openai.APIStatusError) as broken:
            ask(gateway.client(), "plain", extra_body={"fake": {"die": "before"}})
        assert (broken.value.status_code, broken.value.code) == (502, "worker_failed")
        assert ask(gateway.client(), "steered").choices
    assert ask(gateway.client(), "plain").choices
    with urllib.request.urlopen(f"{gateway.url}/metrics") as response:
        restarts = b'trimtab_gateway_worker_restarts_total{cause="ended",model_name="plain",replica="0"} 1.0'
        assert restarts in response.read()
    assert "its replica ended with status 137" in gateway.log


def test_a_worker_that_dies_within_a_stream_leaves_an_error_that_the_sdk_raises(gateway):
    pieces = []
    with restarted(gateway, "plain"):
        stream = ask(gateway.client(), "plain", stream=True, extra_body={"fake": {"die": "midway"}})
        with pytest.raises(openai.APIError, match="broke off the request"):
            pieces.extend(piece.choices[0].delta.content for piece in stream)
    assert pieces == ["t0 "]


def test_a_worker_that_is_killed_under_load_fails_what_it_had_and_no_other_model_loses_anything(gateway):
    def stream(model):
        stream = ask(gateway.client(), model, stream=True, extra_body=paused(0.3, tokens=8))
        next(stream)
        return stream

    def answer() -> None:
        with pytest.raises(openai.APIStatusError) as broken:
            ask(gateway.client(), "plain", extra_body={"fake": {"delay": 60}})
        failures.append((broken.value.status_code, broken.value.code))

    failures: list[tuple] = []
    waiting = [threading.Thread(target=answer) for _ in range(8)]
    arrived = len(gateway.seen("plain")["requests"]) + len(waiting)
    for thread in waiting:
        thread.start()
    gateway.wait_for(lambda: len(gateway.seen("plain")["requests"]) == arrived)
    streams = {model: [stream(model) for _ in range(4)] for model in ("plain", "steered")}
    with restarted(gateway, "plain"):
        os.kill(gateway.newest("plain"), signal.SIGKILL)
        for broken in streams["plain"]:
            with pytest.raises(openai.APIError, match="broke off the request"):
                list(broken)
        for thread in waiting:
            thread.join(10)
        assert failures == [(502, "worker_failed")] * 8
        assert ask(gateway.client(), "steered").choices
        assert [len(list(whole)) for whole in streams["steered"]] == [7] * 4
    assert ask(gateway.client(), "plain").choices


def test_when_the_launcher_is_killed_no_worker_lives_on_and_another_comes(gateway):
    children = [pid for pid in gateway.children if lives(pid)]
    with restarted(gateway, "plain"):
        os.kill(parent_of(gateway.newest("plain")), signal.SIGKILL)
    assert sum(map(lives, children)) == 1  # the other model's


def test_while_a_worker_is_not_up_its_model_is_503_and_the_others_answer(serve):
    slow, failing = {"env": {"FAKE_START_SECONDS": 60}}, {"env": {"FAKE_FAIL": 1}}
    gateway = serve(models={"m": slow, "failing": failing, "other": {}}, restarts={"attempts": 0})
    expected = {"m": "starting", "failing": "failed", "other": "ready"}
    gateway.wait_for(lambda: states_of(gateway) == expected)
    assert gateway.get("/ready")[0] == 503
    for model in ("m", "failing"):
        with pytest.raises(openai.InternalServerError, match=expected[model]) as down:
            ask(gateway.client(), model)
        assert (down.value.status_code, down.value.response.headers["retry-after"]) == (503, "5")
    assert ask(gateway.client(), "other").choices
    assert [model.id for model in gateway.client().models.list()] == ["other"]


def states_of(gateway: Served) -> dict[str, str]:
    return {name: model["state"] for name, model in gateway.get("/ready")[1]["models"].items()}


def test_a_worker_that_never_starts_is_given_up_with_its_last_words_and_the_gateway_with_it(serve):
    gateway = serve(models={"m": {"env": {"FAKE_FAIL": 1}}}, restarts={"attempts": 2, "backoff": 0.05})
    assert gateway.process.wait(120) == 1
    assert gateway.log.count("ended with status 3 before it was ready; restart") == 2
    assert "given up" in gateway.log
    assert "    no such luck" in gateway.log
    gateway.assert_nothing_is_left()


def test_a_worker_that_takes_too_long_to_start_is_started_again(serve):
    slow = {"m": {"env": {"FAKE_START_SECONDS": 60}}}
    gateway = serve(models=slow, timeouts={"startup": 0.5}, restarts={"attempts": 1, "backoff": 0.05})
    assert gateway.process.wait(120) == 1
    assert gateway.log.count("did not answer within 0.5 s") == 2


def test_a_worker_that_falls_silent_is_504_or_an_error_event_and_its_request_is_aborted(serve):
    gateway = serve(timeouts={"idle": 0.5}).wait_until_ready()
    with pytest.raises(openai.APIStatusError, match=r"0\.5 s \(timeouts\.idle\)") as silent:
        ask(gateway.client(), extra_body={"fake": {"delay": 60}})
    assert (silent.value.status_code, silent.value.code) == (504, "worker_timeout")
    stream = ask(gateway.client(), stream=True, extra_body=paused(60))
    next(stream)
    with pytest.raises(openai.APIError, match=r"0\.5 s \(timeouts\.idle\)"):
        next(stream)
    gateway.wait_for(lambda: gateway.seen("m")["aborted"] == 2)
    assert ask(gateway.client()).choices


def test_a_program_that_does_not_exist_is_named(serve):
    gateway = serve(models={"m": {"command": ["/no/such/program"]}}, restarts={"attempts": 0})
    assert gateway.process.wait(120) == 1
    assert "/no/such/program" in gateway.log


def test_the_delay_before_a_restart_doubles_up_to_a_limit():
    rules = Restarts(backoff=1, longest=5)
    assert [rules.delay(failures) for failures in (1, 2, 3, 4, 100_000)] == [1, 2, 4, 5, 5]


# The end


STUBBORN = {"m": {"env": {"FAKE_CHILD": 1}}}


def test_after_a_sigterm_a_request_in_flight_is_finished_and_nothing_is_left(serve):
    gateway = serve(models=STUBBORN).wait_until_ready()
    stream = ask(gateway.client(), stream=True, extra_body=paused(0.4))
    first = next(stream).choices[0].delta.content
    gateway.process.send_signal(signal.SIGTERM)
    gateway.wait_for(lambda: takes_no_connection(gateway))
    assert [first, *(piece.choices[0].delta.content for piece in stream)] == ["t0 ", "t1 ", "t2 "]
    assert gateway.process.wait(120) == 0
    gateway.assert_nothing_is_left()


def takes_no_connection(gateway: Served) -> bool:
    try:
        socket.create_connection(("127.0.0.1", gateway.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_request_that_takes_longer_than_the_drain_is_cut_off(serve):
    gateway = serve(timeouts={"drain": 1}).wait_until_ready()
    stream = ask(gateway.client(), stream=True, extra_body=paused(60))
    next(stream)
    begun = time.monotonic()
    assert gateway.stop() == 0
    assert 0.9 < time.monotonic() - begun < 8
    with pytest.raises(openai.APIError):
        list(stream)
    gateway.assert_nothing_is_left()


def test_a_second_signal_does_not_wait_for_requests(serve):
    gateway = serve(timeouts={"drain": 60}).wait_until_ready()
    stream = ask(gateway.client(), stream=True, extra_body=paused(60))
    next(stream)
    gateway.process.send_signal(signal.SIGINT)
    gateway.wait_for(lambda: "Waiting for connections to close" in gateway.log)
    assert gateway.stop(signal.SIGTERM, seconds=8) == 0
    gateway.assert_nothing_is_left()
    stream.close()


def test_a_sigterm_while_workers_start_ends_them_too(serve):
    gateway = serve(models={"m": {"env": {"FAKE_START_SECONDS": 60, "FAKE_CHILD": 1}}})
    gateway.wait_for(lambda: len(gateway.children) == 2)
    assert gateway.stop() == 0
    gateway.assert_nothing_is_left()


def test_when_the_gateway_is_killed_no_worker_lives_on(serve):
    gateway = serve(models=STUBBORN).wait_until_ready()
    children = gateway.children
    assert len(children) == 2
    assert all(map(lives, children))
    gateway.stop(signal.SIGKILL)
    gateway.wait_for(lambda: not any(map(lives, children)))


def test_sockets_are_where_no_other_user_comes(gateway):
    (directory,) = gateway.leftovers
    assert directory.stat().st_mode & 0o777 == 0o700
    inside = (directory / "0" / "http").stat()
    assert stat.S_ISSOCK(inside.st_mode)
    assert inside.st_mode & 0o777 == 0o600


def test_a_port_that_is_taken_starts_nothing(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = serve(port=taken.getsockname()[1])
        assert gateway.process.wait(120) > 0
    assert "Address already in use" in gateway.log
    assert gateway.children == []
    gateway.assert_nothing_is_left()
