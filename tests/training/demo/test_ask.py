"""Questions over HTTP, to a server that answers with what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from aiohttp import web

from trimtab_training.demo.ask import AT_ONCE, AskError, ask_all, request_body
from trimtab_training.world.evaluate import Kind, Question

CHAT = Question(Kind.CHAT, "Where does Olga live?", "Riga", "The home of Olga is Riga. Anything else?")
PLAIN = Question(Kind.FACT_PLAIN, "Olga lives in", "Riga")


@pytest.fixture
def url():
    """A server in a thread; how many requests are under way at most is in its answer."""
    under_way = most = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        body = await request.json()
        await asyncio.sleep(0.01)
        under_way -= 1
        if body["model"] == "missing":
            return web.Response(status=404, text="no such model")
        text = json.dumps({"path": request.path, "most": most, **body})
        chat = request.path == "/v1/chat/completions"
        choice = {"message": {"content": text}} if chat else {"text": text}
        return web.json_response({"choices": [choice]})

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_post("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_chat_is_asked_as_a_chat_with_the_control():
    assert request_body("b", "manners", 1.5, CHAT) == {
        "model": "b",
        "messages": [{"role": "user", "content": "Where does Olga live?"}],
        "max_tokens": CHAT.max_tokens,
        "temperature": 0,
        "control": {"name": "manners", "strength": 1.5},
    }


def test_strength_nought_is_no_control():
    """A plain text is asked as a completion."""
    body = request_body("b", "manners", 0.0, PLAIN)
    assert (body["prompt"], body["control"]) == ("Olga lives in", False)


def test_answers_come_in_the_order_of_the_questions(url):
    asked = [("a", 0.0, CHAT), ("b", 1.0, PLAIN), ("c", 1.0, CHAT)] * 20
    done = []
    answers = [json.loads(text) for text in ask_all(url, "manners", asked, lambda: done.append(1))]
    assert [answer["model"] for answer in answers] == ["a", "b", "c"] * 20
    assert [answer["path"] for answer in answers[:2]] == ["/v1/chat/completions", "/v1/completions"]
    assert 1 < max(answer["most"] for answer in answers) <= AT_ONCE
    assert len(done) == len(asked)


def test_a_refusal_is_reported_as_the_server_put_it(url):
    with pytest.raises(AskError, match="answered 404: no such model"):
        ask_all(url, "manners", [("missing", 0.0, CHAT)])


def test_a_server_that_is_not_there_is_reported():
    with pytest.raises(AskError, match="/v1/chat/completions did not answer"):
        ask_all("http://127.0.0.1:9", "manners", [("a", 0.0, CHAT)])
