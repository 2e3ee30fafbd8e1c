"""What clients of the real gateway and real engines get, token by token, against the slow reference."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from openai import AsyncOpenAI

from reference import Model, PathReference, Reference
from tiny import sentences
from trimtab_processors.pack import DEFAULT_ROUTING

PROMPTS, TOKENS, AT_ONCE = 48, 64, 16
STRENGTHS = (None, 0.5, 1.0, 1.5)
ROUTINGS = (None, "path", "pm-mined")
TIE = 1e-4
TIES_ALLOWED = 0.002


@dataclass(frozen=True)
class Ask:
    """One request: a raw prompt or a chat, streamed or not, at some strength or without control."""

    text: str
    chat: bool
    stream: bool
    strength: float | None
    routing: str | None = None

    @property
    def messages(self):
        return [{"role": "user", "content": self.text}]

    @property
    def control(self):
        if self.strength is None:
            return False
        return {"name": "control", "strength": self.strength, "routing": self.routing}


def asks() -> list[Ask]:
    """Every combination of endpoint, streaming and strength, under each routing and the default."""
    return [
        Ask(text, i % 2 == 0, i // 2 % 2 == 0, STRENGTHS[i // 4 % 4], ROUTINGS[i // 16])
        for i, text in enumerate(sentences(PROMPTS, seed=11))
    ]


async def token_ids(client: AsyncOpenAI, model: str, ask: Ask) -> list[int]:
    """The tokens of a greedy answer of at most `TOKENS` tokens."""
    common = {
        "model": model,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": ask.stream,
        "extra_body": {"control": ask.control, "return_token_ids": True},
    }
    answer = await (
        client.chat.completions.create(messages=ask.messages, **common)
        if ask.chat
        else client.completions.create(prompt=ask.text, **common)
    )
    if not ask.stream:
        return answer.choices[0].token_ids
    choices = [choice async for chunk in answer for choice in chunk.choices]
    return [token for choice in choices for token in getattr(choice, "token_ids", None) or []]


async def answers(url: str, model: str) -> list[list[int]]:
    """All answers, asked `AT_ONCE` at a time."""
    slots = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def answer(ask: Ask) -> list[int]:
            async with slots:
                return await token_ids(client, model, ask)

        return await asyncio.gather(*map(answer, asks()))


def prompt_ids(model: Model, ask: Ask) -> list[int]:
    if ask.chat:
        return model.tokenizer.apply_chat_template(
            ask.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return model.tokenizer.encode(ask.text)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_token_of_a_mixed_batch_is_that_of_the_reference(server, family, name, record_property):
    """Greedy, 48 prompts of up to 64 tokens, 16 at once, controlled and uncontrolled mixed."""
    given = asyncio.run(answers(server, name))
    models = Model(family.targets[name]), Model(family.control)
    references = {"pm-mined": Reference(*models), "path": PathReference(*models)}
    compared = ties = 0
    for ask, tokens in zip(asks(), given, strict=True):
        reference = references[ask.routing or DEFAULT_ROUTING]
        own, prompt = prompt_ids(reference.control, ask), prompt_ids(reference.target, ask)
        assert len(tokens) == TOKENS or tokens[-1] == reference.target.tokenizer.eos_token_id
        for token, step in zip(tokens, reference.steps(prompt, own, ask.strength or 0, tokens), strict=True):
            compared += 1
            ties += step.gap <= TIE
            assert token == step.token or step.gap <= TIE
    record_property("tokens", compared)
    record_property("ties", ties)
    print(f"{name}: {compared} tokens, {ties} within {TIE} of a tie")
    assert compared > PROMPTS * TOKENS / 2
    assert ties <= compared * TIES_ALLOWED
