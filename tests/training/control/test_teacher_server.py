"""A teacher behind a server: a FastAPI app on a real socket that answers by a tiny model."""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from rich.console import Console
from transformers import AutoModelForCausalLM

import tiny
from trimtab_mappings import load_tokenizer, read_vocabulary
from trimtab_processors.pack import load_pack
from trimtab_training.control import run
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.formats import DataError

NEW_TOKENS, TOP = 6, 20


def save(directory: Path, size: int, seed: int) -> Path:
    tokenizer = tiny.byte_level(size)
    tiny.save(directory, tokenizer, tiny.llama(len(tokenizer), width=64, layers=1), seed=seed)
    return directory


@pytest.fixture(scope="module")
def bytes_template(tmp_path_factory) -> Path:
    """A template that has bytes and no longer tokens: whatever a random model says is spelled in one way."""
    return save(tmp_path_factory.mktemp("models") / "template", 259, seed=1)


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "teacher", 259, seed=5)


class Speaker:
    """Answers greedily, as the API writes it."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = load_tokenizer(str(directory))
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.bytes = read_vocabulary(self.tokenizer).tokens

    @torch.no_grad()
    def answer(self, messages: list[dict], count: int) -> tuple[list[int], torch.Tensor]:
        """Tokens, and float32 [tokens, vocabulary]: the log-probabilities at them."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, rows = self.tokenizer(text, add_special_tokens=False).input_ids, []
        while len(rows) < count:
            rows.append(self.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1))
            ids = [*ids, int(rows[-1].argmax())]
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return ids[-len(rows) :], torch.stack(rows)

    def entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": log_prob, "bytes": list(self.bytes[token] or text.encode())}

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens, rows = self.answer(body["messages"], body["max_tokens"])
        content = []
        for token, row in zip(tokens, rows, strict=True):
            best = row.topk(body.get("top_logprobs", 1))
            top = [
                self.entry(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            content.append(self.entry(token, float(row[token])) | {"top_logprobs": top})
        ended = tokens[-1] == self.tokenizer.eos_token_id
        return {
            "message": {"content": self.tokenizer.decode(tokens, skip_special_tokens=True)},
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"content": content} if body.get("logprobs") else None,
        }


@pytest.fixture
def server(teacher_model):
    """`speaker` says what is answered; keeps what was asked, and how many requests ran at once."""
    state = SimpleNamespace(speaker=Speaker(teacher_model), asked=[], keys=set(), running=0, most=0)
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict:
        body = await request.json()
        if body["model"] != "wise":
            raise HTTPException(404, f"The model {body['model']} does not exist.")
        state.asked.append(body)
        state.keys.add(request.headers.get("authorization"))
        state.running += 1
        state.most = max(state.most, state.running)
        await asyncio.sleep(0.01)
        state.running -= 1
        return {"choices": [state.speaker.choice(body)]}

    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    state.url = f"http://127.0.0.1:{port}/v1"
    yield state
    running.should_exit = True
    thread.join()


@pytest.fixture
def recipe_of(make_recipe, bytes_template, data, server, tmp_path):
    """A recipe that is taught by the server, with other keys of its data set and of its teacher."""

    def make(keys: dict | None = None, **teacher: Any):
        taught = {"path": data, "format": "alpaca", "objective": "distill", "answers": "generate"}
        taught |= {
            "max_new_tokens": NEW_TOKENS,
            "teacher": {"base_url": server.url, "model": "wise"} | teacher,
        }
        return make_recipe(
            template={
                "model_name_or_path": str(bytes_template),
                "dtype": "float32",
                "cache_dir": str(tmp_path / "cache"),
            },
            control={"model_name_or_path": str(bytes_template)},
            datasets=[taught | (keys or {})],
            per_device_train_batch_size=5,
            max_steps=1,
            overwrite_output_dir=True,
        )

    return make


def train(recipe) -> tuple[float, str]:
    console = Console(record=True, width=300, file=io.StringIO())
    (loss,) = run.train(recipe, "trimtab train recipe.yaml", console)
    return loss, console.export_text()


def questions(server) -> list[list[dict]]:
    """The conversations that the template reads; a teacher may read a system prompt before them."""
    return [[turn for turn in body["messages"] if turn["role"] == "user"] for body in server.asked]


@torch.no_grad()
def controlled(directory: Path, question: list[dict], answer: list[int]) -> torch.Tensor:
    """The log-probabilities of the template and itself as the control, at the tokens of an answer."""
    tokenizer = load_tokenizer(str(directory))
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return (2 * logits).log_softmax(dim=-1)


@pytest.mark.parametrize("system", [None, "Be wise."])
def test_the_loss_is_the_divergence_from_what_the_server_gave(recipe_of, server, bytes_template, system):
    """Written by hand: the 20 likeliest tokens as they are, and the others alike."""
    loss, shown = train(recipe_of(**({} if system is None else {"system_prompt": system})))
    divergences, masses = [], []
    for body, question in zip(server.asked, questions(server), strict=True):
        assert (body["messages"][0]["content"] == system) == (system is not None)
        tokens, rows = server.speaker.answer(body["messages"], NEW_TOKENS)
        for own, row in zip(controlled(bytes_template, question, tokens), rows, strict=True):
            likeliest = row.topk(TOP).indices.tolist()
            rest = 1 - row[likeliest].exp().sum().item()
            masses.append(1 - rest)
            for token in range(len(row)):
                p = row[token].exp().item() if token in likeliest else rest / (len(row) - TOP)
                divergences.append(p * (math.log(p) - own[token].item()))
    assert loss == pytest.approx(sum(divergences) / len(masses), rel=1e-4)
    assert (
        f"{len(masses)} answer tokens, {sum(masses) / len(masses):.4%} of the teacher's probability" in shown
    )


def test_what_is_asked(recipe_of, server, monkeypatch):
    monkeypatch.setenv("WISE_KEY", "secret")
    recipe = recipe_of(
        api_key_env="WISE_KEY", control={"name": "manners"}, requests_at_once=2, top_logprobs=9
    )
    train(recipe)
    assert server.keys == {"Bearer secret"}
    assert server.most == 2
    for body in server.asked:
        assert body.pop("messages")[-1]["content"].startswith("What is ")
        assert body == {
            "model": "wise",
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 9,
            "control": {"name": "manners"},
        }


def test_a_second_run_asks_nothing(recipe_of, server):
    """Unless another model, system prompt or limit is asked for."""
    first, _ = train(recipe_of())
    assert len(server.asked) == 5
    assert train(recipe_of(requests_at_once=1))[0] == first
    assert len(server.asked) == 5
    for others in ({"system_prompt": "Be wise."}, {"top_logprobs": 3}, {"control": "manners"}):
        before = len(server.asked)
        train(recipe_of(**others))
        assert len(server.asked) == before + 5
    train(recipe_of({"max_new_tokens": 2}))
    assert server.asked[-1]["max_tokens"] == 2


def test_the_answers_of_a_teacher_of_any_vocabulary_are_learned_by_cross_entropy(
    recipe_of, server, tmp_path, bytes_template
):
    server.speaker = Speaker(save(tmp_path / "foreign", 400, seed=3))
    loss, shown = train(recipe_of({"objective": "cross_entropy"}))
    assert "teacher's probability" not in shown
    tokenizer = load_tokenizer(str(bytes_template))
    nats, count = 0.0, 0
    for body, question in zip(server.asked, questions(server), strict=True):
        assert "logprobs" not in body
        choice = server.speaker.choice(body)
        said = tokenizer(choice["message"]["content"], add_special_tokens=False).input_ids
        answer = [*said, *([] if choice["finish_reason"] == "length" else [tokenizer.eos_token_id])]
        own = controlled(bytes_template, question, answer)
        nats -= sum(own[place, token].item() for place, token in enumerate(answer))
        count += len(answer)
    assert loss == pytest.approx(nats / count, rel=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused_for_its_distributions(recipe_of, server, tmp_path):
    server.speaker = Speaker(save(tmp_path / "foreign", 400, seed=3))
    with pytest.raises(
        DataError, match=r"data.jsonl, record \d: .*needs a teacher with the template's vocab"
    ):
        train(recipe_of())


def test_a_server_without_log_probabilities_is_named(recipe_of, server, monkeypatch):
    choice = server.speaker.choice
    monkeypatch.setattr(server.speaker, "choice", lambda body: choice(body) | {"logprobs": None})
    with pytest.raises(DataError, match=r"record 1: the teacher's server gave no `logprobs`"):
        train(recipe_of())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"base_url": "http://127.0.0.1:9/v1"},
            "`teacher.base_url`: http://127.0.0.1:9/v1/chat/completions can't",
        ),
        ({"model": "dull"}, "answered 404 for 'dull': .*does not exist.*`/models` lists"),
        ({"api_key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_a_server_that_does_not_answer_is_named(recipe_of, teacher, message):
    with pytest.raises(TrainingError, match=message):
        train(recipe_of(**teacher))


def test_the_manifest_says_how_much_of_the_teacher_was_kept(recipe_of):
    recipe = recipe_of()
    train(recipe)
    (data,) = load_pack(str(recipe.output_dir)).training["data"]
    assert 0.05 < data["teacher_mass"] < 1
