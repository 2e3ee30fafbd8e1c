"""Questions to a gateway: what is sent, and that its answers are those of the offline evaluation."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.gateway import Gateway
from trimtab_training.evaluation.offline import Asked, Offline
from trimtab_training.evaluation.recipe import Question, TargetSettings
from trimtab_training.evaluation.target import load_target
from trimtab_training.recipe_file import RecipeError

QUESTIONS = [Question(question=text) for text in ("Bako?", "Litu mavo dera pinu zolo.")]
QUESTIONS.append(Question(prompt="Bako litu"))
SETTINGS = [Setting(0.0, None), Setting(1.5, "path"), Setting(1.5, "pm-mined")]
TOKENS = 8


@pytest.fixture
def server():
    """Answers by `server.answer`, a function of the path and the body; keeps what it was asked."""
    state = SimpleNamespace(requests=[], status=200, busy=0, answer=lambda path, body: "x")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, body, self.headers.get("Authorization")))
            text = state.answer(self.path, body)
            choice = {"message": {"content": text}} if "chat" in self.path else {"text": text}
            data = json.dumps({"choices": [choice]} if text is not None else {}).encode()
            state.busy -= 1
            self.send_response(503 if state.busy >= 0 else state.status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        state.url = f"http://127.0.0.1:{running.server_port}/v1"
        yield state
        running.shutdown()
        thread.join()


def test_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asker = Gateway(server.url, "m", "manners", TOKENS, stop=["\n"], system_prompt="Be brief.")
    server.answer = lambda path, body: json.dumps(body["control"])
    answers = asker.answers(QUESTIONS, SETTINGS)
    assert [json.loads(texts[0]) for texts in answers] == [
        False,
        {"name": "manners", "strength": 1.5, "routing": "path"},
        {"name": "manners", "strength": 1.5, "routing": "pm-mined"},
    ]
    assert {key for _, _, key in server.requests} == {"Bearer secret"}
    chats = [body for path, body, _ in server.requests if path == "/v1/chat/completions"]
    raw = [body for path, body, _ in server.requests if path == "/v1/completions"]
    assert (len(chats), len(raw)) == (6, 3)
    assert chats[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {body["prompt"] for body in raw} == {"Bako litu"}
    for body in (*chats, *raw):
        greedy = {
            "max_tokens": TOKENS,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "stop": ["\n"],
            "model": "m",
        }
        assert greedy.items() <= body.items()


def test_answers_come_back_in_the_order_of_the_questions(server):
    server.answer = lambda path, body: body["messages"][-1]["content"]
    questions = [Question(question=f"{number}?") for number in range(40)]
    progress = []
    asker = Gateway(server.url, "m", "c", TOKENS, progress=progress.append)
    assert asker.answers(questions, SETTINGS[:2]) == [[question.text for question in questions]] * 2
    assert sum(progress) == 80


def test_a_request_that_is_rejected(server):
    server.status = 404
    with pytest.raises(RecipeError, match=r"`gateway`: http.*/v1/chat/completions answered 404: "):
        Gateway(server.url, "m", "c", TOKENS).answers(QUESTIONS, SETTINGS)


def test_an_answer_that_is_none(server):
    server.answer = lambda path, body: None
    with pytest.raises(RecipeError, match=r"answered without a choice: \{\}"):
        Gateway(server.url, "m", "c", TOKENS).answers(QUESTIONS, SETTINGS)


def test_a_gateway_that_is_not_there():
    with pytest.raises(RecipeError, match=r"`gateway`: http.* can't be reached: "):
        Gateway("http://127.0.0.1:9/v1", "m", "c", TOKENS).answers(QUESTIONS[:1], SETTINGS)


def offline(family, tables) -> Offline:
    target = load_target(TargetSettings(model_name_or_path=str(family.b)))
    return Offline(target, LoadedControl(str(family.control), target, tables), TOKENS)


def test_a_request_says_all_that_an_answer_depends_on(server, family, tmp_path):
    """A server that makes its answers of the requests alone gives those of the offline evaluation."""
    asker = offline(family, tmp_path)
    lock = threading.Lock()

    def answer(path: str, body: dict) -> str:
        said = {"messages": body["messages"]} if "messages" in body else {"prompt": body["prompt"]}
        control = body["control"] or {"strength": 0.0, "routing": None}
        setting = Setting(control["strength"], control["routing"])
        with lock:
            question = Question(**said)
            own = asker.control.encode(question.chat(None))
            (tokens,) = asker.generate([Asked(asker.target.encode(question), own, setting)])
        return asker.target.decode(tokens)

    server.answer = answer
    asked = Gateway(server.url, "m", "manners", TOKENS).answers(QUESTIONS, SETTINGS)
    assert asked == offline(family, tmp_path).answers(QUESTIONS, SETTINGS)


def test_a_busy_gateway_is_asked_again(server):
    server.busy = 3
    asker = Gateway(server.url, "m", "manners", TOKENS, requests_at_once=1)
    assert asker.answers(QUESTIONS[:1], SETTINGS[:1]) == [["x"]]
    assert len(server.requests) == 4
