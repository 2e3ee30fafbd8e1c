"""What a vLLM server says of its engine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time

import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from trimtab_processors import liveness
from trimtab_processors.liveness import EngineHealth

SPIN = "while True: pass"
WAIT = "import time; time.sleep(60)"


class Engine:
    """vLLM's client of an engine that answers when it is let."""

    def __init__(self) -> None:
        self.errored = False
        self.asked = 0
        self.error: Exception | None = None
        self.free = asyncio.Event()

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await self.free.wait()
        if self.error is not None:
            raise self.error
        return False


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(liveness, "_PATIENCE_SECONDS", 0.05)
    return Engine()


@pytest.fixture
def client(engine):
    app = FastAPI()
    app.state.engine_client = engine
    app.add_middleware(EngineHealth)
    app.get("/health")(lambda: "vLLM's own")
    with TestClient(app) as client:
        yield client


def ask(client) -> dict:
    response = client.get("/health/engine")
    assert response.status_code == 200
    return response.json()


def test_an_engine_that_answers_lives(client, engine):
    engine.free.set()
    assert ask(client) == {"answers": True}
    assert engine.asked == 1


def test_an_engine_that_does_not_answer_is_asked_once_until_it_does(client, engine):
    answers = [ask(client) for _ in range(3)]
    assert [answer["answers"] for answer in answers] == [False] * 3
    assert engine.asked == 1
    client.portal.call(engine.free.set)
    assert ask(client) == {"answers": True}


def test_an_error_is_an_answer(client, engine):
    engine.free.set()
    engine.error = RuntimeError("engines differ")
    assert ask(client) == {"answers": True}


def test_an_engine_that_has_failed_does_not_answer(client, engine):
    engine.free.set()
    engine.errored = True
    assert ask(client)["answers"] is False


def test_a_server_without_an_engine_has_none_that_could_hang(client):
    client.app.state.engine_client = None
    assert ask(client) == {"answers": True}


def test_everything_else_is_vllms(client):
    assert client.get("/health").json() == "vLLM's own"
    assert client.get("/health/engines").status_code == 404
    assert client.post("/health/engine").status_code == 404


@contextlib.contextmanager
def child(code: str):
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("code", "computes"), [(SPIN, True), (WAIT, False)])
def test_the_threads_of_the_processes_below_tell_a_busy_engine_from_one_that_waits(
    client, monkeypatch, code, computes
):
    """Those of its children too, whatever else the machine has to do."""
    monkeypatch.setattr(liveness, "_PATIENCE_SECONDS", 0.5)
    grandparent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with child(grandparent) as parent:
        time.sleep(2)  # until both have started
        busy = ask(client)["busy"]
        for process in psutil.Process(parent.pid).children():
            process.kill()
    assert (busy > 0.5) == computes
    assert (busy < 0.1) == (not computes)


def test_of_threads_that_the_kernel_does_not_tell_of_nothing_is_said(client, monkeypatch):
    monkeypatch.setattr(liveness, "_thread_seconds", dict)
    assert ask(client) == {"answers": False, "busy": None}
