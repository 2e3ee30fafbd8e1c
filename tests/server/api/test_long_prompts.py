"""Long prompts under a control, in a gateway: refused before they cost anything, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from trimtab_server.api import bodies as body_reader
from trimtab_server.controls.preparing import Preparer
from trimtab_server.controls.prompts import PromptRenderer


def said(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def untokenized(monkeypatch):
    """Fails whoever tokenizes."""

    def refuse(*_):
        raise AssertionError("tokenized")

    monkeypatch.setattr(PromptRenderer, "encode", refuse)


LONG = "a long story " * 100_000


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/chat/completions", {"messages": said(LONG)}),
        ("/v1/chat/completions", {"messages": said([{"type": "text", "text": LONG}])}),
        ("/v1/chat/completions", {"messages": said("a") * 40_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "", "name": LONG}]}),
        ("/v1/messages", {"messages": said("hi"), "system": LONG}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/responses", {"input": "hi", "instructions": LONG}),
    ],
)
def test_a_conversation_beyond_the_limit_is_refused_before_it_is_tokenized(
    two_models, untokenized, path, payload
):
    response = two_models.client.post(path, json={"model": "plain", "control": "one", **payload})
    assert response.status_code == 413
    assert "limits.control_prompt_bytes" in response.text
    param = {"/v1/responses": "input", "/v1/messages": None}.get(path, "messages")
    assert response.json()["error"].get("param") == param
    assert two_models.asked("plain") == []


def test_without_control_it_is_the_workers_business(two_models):
    response = two_models.chat(model="plain", control=False, messages=said(LONG))
    assert response.status_code == 200
    assert two_models.last("plain")["messages"] == said(LONG)


def test_images_are_no_part_of_what_a_control_reads(two_models):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2_000_000}}
    messages = said([{"type": "text", "text": "What is this?"}, image])
    assert two_models.chat(model="plain", control="one", messages=messages).status_code == 200
    assert two_models.last("plain")["messages"] == messages


def test_a_conversation_longer_than_any_prompt_of_the_model_is_refused_before_it_is_tokenized(
    two_models, untokenized
):
    """The fake replica says that its context has 256 tokens; here, of at most 10 bytes."""
    two_models.replica("plain").prompt_bytes = 2560
    response = two_models.chat(model="plain", control="one", messages=said("x" * 2561))
    assert response.status_code == 413
    assert "more than any prompt of 'plain': 2560" in two_models.error(response)["message"]


def test_what_the_worker_says_of_its_context_is_learnt_when_it_is_ready(two_models):
    assert two_models.replica("plain").prompt_bytes == 256 * 9


def test_a_long_prompt_holds_up_no_short_one_of_another_model(two_models, monkeypatch):
    two_models.replica("plain").prompt_bytes = None
    going_on, tokenizing = threading.Event(), threading.Event()
    encode = PromptRenderer.encode

    def slowly(self, text, limit, param):
        if len(text) > 100_000:
            tokenizing.set()
            assert going_on.wait(30)
        return encode(self, text, limit, param)

    monkeypatch.setattr(PromptRenderer, "encode", slowly)
    answers = []
    long = threading.Thread(
        target=lambda: answers.append(
            two_models.chat(model="plain", control="one", messages=said("x" * 120_000)).status_code
        )
    )
    long.start()
    assert tokenizing.wait(30)
    assert two_models.chat(model="steered", control="one").status_code == 200
    assert not answers
    going_on.set()
    long.join(30)
    assert answers == [200]


def test_it_is_tokenized_within_its_turn(start, pack, monkeypatch):
    """A model that has all its requests tokenizes nothing for those that wait."""
    began, going_on = [], threading.Event()
    xargs = Preparer.xargs

    async def watched(self, model, *others):
        began.append(model.name)
        while not going_on.is_set():  # noqa: ASYNC110 - the test's thread sets it
            await asyncio.sleep(0.01)
        return await xargs(self, model, *others)

    monkeypatch.setattr(Preparer, "xargs", watched)
    gateway = start(controls={"one": str(pack)}, limits={"concurrent": 1, "queued": 1})
    statuses = []

    def ask() -> None:
        statuses.append(gateway.chat(model="m", control="one").status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: statuses == [429])  # one has its turn, one waits, and for one there is no place
    assert began == ["m"]
    going_on.set()
    for thread in threads:
        thread.join(30)
    assert statuses == [429, 200, 200]
    assert began == ["m", "m"]


def test_bodies_beyond_the_room_for_them_wait_until_others_have_their_answers(start):
    """Each takes more than half of it."""
    gateway = start(limits={"body_bytes": 2**20, "body_bytes_total": 2**20})
    large = json.dumps({"model": "m", "prompt": "x" * 700_000, "fake": {"delay": 1}})
    statuses = []

    def ask() -> None:
        statuses.append(gateway.post(large, "/v1/completions").status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: gateway.asked("m"))
    assert gateway.chat(model="m").status_code == 200  # a small one takes no room
    assert len(gateway.asked("m")) == 2  # that one, and one of the large ones
    for thread in threads:
        thread.join(30)
    assert statuses == [200, 200]


def test_a_body_for_which_there_is_no_room_is_503_after_a_while(start, monkeypatch):
    monkeypatch.setattr(body_reader, "_ROOM_SECONDS", 0.2)
    gateway = start(limits={"body_bytes": 2**20, "body_bytes_total": 2**20})
    slow = json.dumps({"model": "m", "prompt": "x" * 700_000, "fake": {"delay": 3}})
    holding = threading.Thread(target=gateway.post, args=(slow, "/v1/completions"))
    holding.start()
    wait_until(lambda: gateway.asked("m"))
    response = gateway.post(slow, "/v1/completions")
    assert (response.status_code, gateway.error(response)["code"]) == (503, "overloaded")
    assert "retry-after" in response.headers
    holding.join(30)


def test_a_long_alias_is_refused(two_models):
    response = two_models.chat(model="plain:" + " " * 2000 + "one")
    assert (response.status_code, two_models.error(response)["param"]) == (400, "model")
    assert len(response.text) < 500
