"""The plugin in a stock vLLM server, whatever its scheduler and its sampler do, against the slow reference.

Every test runs on vLLM's V1 runner, and on its V2 runner with asynchronous scheduling. Prefix caching is on.
Three controls with tokenizers of their own, and a pack of an expert and an anti-expert,
are served at once.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, OpenAI

import tiny
from engines import V1, V2, Engine, engine
from reference import Model, PathReference, PiecesReference, Reference, Segmented, SegmentedPath
from tiny import sentences
from trimtab_processors.pack import DEFAULT_ROUTING, Component, Pack
from trimtab_processors.settings import DEFAULT_KL_EVERY

pytestmark = pytest.mark.engine

BLOCK, BLOCKS, BUDGET, MOST = 32, 20, 48, 16
ARGS = (
    *("--max-model-len", str(tiny.CONTEXT), "--block-size", str(BLOCK), "--max-num-seqs", str(MOST)),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
STARVED = ("--num-gpu-blocks-override", str(BLOCKS), "--max-num-batched-tokens", str(BUDGET))
ROOMY = ("--max-num-batched-tokens", str(MOST * tiny.CONTEXT))
"""On CPUs vLLM 0.32 can't read the prompt of a request with a seed in pieces."""
WINDOW = 64
DRAFTS = 2


def drafted(target: Path) -> tuple[str, str]:
    """Arguments with which the target drafts for itself, so that many drafts are accepted."""
    settings = {"method": "draft_model", "model": str(target), "num_speculative_tokens": DRAFTS}
    return ("--speculative-config", json.dumps(settings))


CLOSE = 2e-3
"""Logprobs of the engine and of the reference agree within this."""
TIE = 1e-4


@dataclass(frozen=True)
class World:
    """A target, and controls of every kind beside it."""

    runner: str
    target: Path
    controls: dict[str, Path]
    references: dict[str, Reference]
    """By control and routing."""

    @property
    def model(self) -> Model:
        return self.references["other pm-mined"].target

    @property
    def drafts(self) -> int:
        """The drafts that a request may have in the engine that is starved."""
        return DRAFTS if self.runner == V2 else 0

    @property
    def routings(self) -> list[str]:
        """Those that the runner has."""
        return ["pm-mined", "path", "pieces"] if self.runner == V1 else ["pm-mined", "path"]

    def control(self, name: str) -> Model:
        return self.references[f"{name} pm-mined"].control


@pytest.fixture(scope="module", params=[V1, V2])
def runner(request):
    """The model runner of vLLM."""
    return request.param


@pytest.fixture(scope="module")
def world(family, runner, tmp_path_factory):
    """`other` cuts otherwise than the target, `chars` has no bytes and a short window, `bytes` falls back to
    bytes, `pair` is an expert and an anti-expert."""
    root = tmp_path_factory.mktemp("world")
    places = {name: root / name for name in ("chars", "bytes", "pair", "anti")}
    chars, fallback = tiny.metaspace(500, seed=5), tiny.byte_fallback(560, seed=6)
    short = tiny.llama(len(chars), width=64)
    short.max_position_embeddings = WINDOW
    tiny.save(places["chars"], chars, short, seed=7)
    tiny.save(places["bytes"], fallback, tiny.llama(len(fallback), width=64), seed=8)
    own = Model(family.b).tokenizer
    tiny.save(places["pair"], own, tiny.llama(len(own), width=64), seed=9)
    tiny.save(places["anti"], own, tiny.llama(len(own), width=64, layers=1), seed=10)
    components = (Component(weight=1.5), Component(model=str(places["anti"]), weight=-0.5))
    Pack(name="pair", components=components).save(places["pair"])
    places["other"] = family.control
    target, models = Model(family.b), {name: Model(place) for name, place in places.items()}
    controls = {
        "other": (models["other"], {}),
        "chars": (models["chars"], {"window": WINDOW}),
        "bytes": (models["bytes"], {}),
        "pair": (models["pair"], {"parts": [(models["pair"], 1.5), (models["anti"], -0.5)]}),
    }
    routings = {"pm-mined": Reference, "path": PathReference, "pieces": PiecesReference}
    if runner == V2:
        routings = {"pm-mined": Segmented, "path": SegmentedPath}
    references = {
        f"{control} {routing}": make(target, model, **options)
        for control, (model, options) in controls.items()
        for routing, make in routings.items()
    }
    if runner == V2:  # a control has room to look ahead, whatever routing a request has
        for name in controls:
            references[f"{name} pm-mined"].window = references[f"{name} path"].window
    return World(runner, family.b, {name: places[name] for name in controls}, references)


def plugin(world: World, directory: Path) -> dict[str, Any]:
    controls = {name: str(place) for name, place in world.controls.items()}
    return {"controls": controls, "tables": str(directory)}


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """An engine with the plugin and room for all."""
    directory = tmp_path_factory.mktemp("engine")
    settings = plugin(world, directory)
    with engine(world.target, directory, *ARGS, *ROOMY, plugin=settings, runner=world.runner) as running:
        yield running


@pytest.fixture(scope="module")
def starved(world, tmp_path_factory):
    """One with blocks for a few requests, so that it preempts, and a budget of few tokens a step, so that it
    reads prompts in pieces. On V2 it drafts, too, which vLLM refuses beside a processor on V1."""
    directory = tmp_path_factory.mktemp("starved")
    with engine(
        world.target,
        directory,
        *(*ARGS, *STARVED, *(drafted(world.target) if world.runner == V2 else ())),
        plugin=plugin(world, directory),
        runner=world.runner,
        cores="1",
    ) as running:
        yield running


@dataclass(frozen=True)
class Ask:
    """One request to complete a prompt of token ids."""

    prompt: list[int]
    control: str | None = None
    strength: float = 1.0
    own: list[int] | None = None
    """The control's prompt."""
    top_k: int = 0
    min_p: float = 0.0
    until: int = 0
    routing: str | None = None
    drafts: int = 0
    """Of the engine that is asked."""
    seen: Any = lambda logits, _: logits
    """What vLLM does to the target's logits before the control sees them; also given the output so far."""
    tokens: int = 24
    body: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters; greedy where it has no temperature."""

    def request(self) -> dict[str, Any]:
        xargs: dict[str, Any] = {}
        if self.control:
            xargs = {"trimtab_control": self.control, "trimtab_strength": self.strength}
            xargs |= {"trimtab_prompt": self.own} if self.own else {}
            xargs |= {"trimtab_top_k": self.top_k} if self.top_k else {}
            options = {"min_p": self.min_p, "until": self.until, "routing": self.routing}
            xargs |= {f"trimtab_{name}": value for name, value in options.items() if value}
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "vllm_xargs": xargs}
        sampling = {"temperature": 0.0, **self.body}
        known = {"temperature", "n", "seed", "stop", "logit_bias", "presence_penalty", "frequency_penalty"}
        return {
            "model": "m",
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "logprobs": 5,
            **{key: value for key, value in sampling.items() if key in known},
            "extra_body": extra | {key: value for key, value in sampling.items() if key not in known},
        }


def client(server: Engine) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(server: Engine, ask: Ask) -> list[Any]:
    with client(server) as api:
        return api.completions.create(**ask.request()).choices


def complete_all(server: Engine, asks: list[Ask]) -> list[Any]:
    """All at once; the first choice of each."""

    async def run() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            answers = await asyncio.gather(*(api.completions.create(**ask.request()) for ask in asks))
            return [answer.choices[0] for answer in answers]

    return asyncio.run(run())


def prompts(world: World, count: int, seed: int = 0) -> list[list[int]]:
    return [world.model.tokenizer.encode(text) for text in sentences(count, seed=seed)]


def long_prompt(world: World, length: int) -> list[int]:
    return world.model.tokenizer.encode(" ".join(sentences(40, seed=2)))[:length]


def own_prompt(world: World, control: str, text: str = "Bo said to me:") -> list[int]:
    return world.control(control).tokenizer.encode(text)


def ask_for(world: World, control: str, prompt: list[int], **options: Any) -> Ask:
    return Ask(prompt, control, own=own_prompt(world, control), **options)


def expected_logits(world: World, ask: Ask, output: list[int], behind: int = 0) -> list[torch.Tensor]:
    """`behind`: see `Segmented`."""
    if ask.control is None:
        return [world.model.logits(ask.prompt + output[:position]) for position in range(len(output))]
    reference = world.references[f"{ask.control} {ask.routing or DEFAULT_ROUTING}"]
    if isinstance(reference, Segmented):
        reference.behind, reference.drafts = behind, ask.drafts
    guards = {"top_k": ask.top_k, "min_p": ask.min_p, "until": ask.until}
    return list(reference.logits(ask.prompt, ask.own, ask.strength, output, seen=ask.seen, **guards))


def check(world: World, ask: Ask, choice: Any, adjust: Any = lambda logits, output: logits) -> int:
    """Each logprob is that of the reference, and a greedy token its best, but for ties.

    `adjust` does to the reference's logits, given the output so far, what the request asked the sampler for.
    """
    output = choice.token_ids
    is_cut_late = world.runner == V2 and ask.control == "chars"  # the only one with a window that is reached
    for position, candidates in enumerate(
        zip(
            *(expected_logits(world, ask, output, behind) for behind in range(1 + 2 * is_cut_late)),
            strict=True,
        )
    ):
        top = choice.logprobs.top_logprobs[position]
        given = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        rows = [adjust(logits.clone(), output[:position]).log_softmax(dim=0) for logits in candidates]
        logprobs = min(
            rows, key=lambda row: max(abs(value - float(row[token])) for token, value in given.items())
        )
        for token, value in given.items():
            assert value == pytest.approx(max(float(logprobs[token]), -9999.0), abs=CLOSE)
        if not ask.body.get("temperature"):
            assert float(logprobs.max() - logprobs[output[position]]) <= TIE
    return len(output)


def counted(world: World, server: Engine, name: str, **labels: str) -> float:
    """A metric of the plugin, which on V2 counts some steps late."""
    if world.runner == V2:
        complete(server, Ask(prompts(world, 1)[0], tokens=4))
    return server.metric(name, **labels)


CONTROLS = ("other", "chars", "bytes", "pair")


def test_requests_that_join_and_leave_are_preempted_and_share_a_step_with_other_controls(world, starved):
    """Twenty-four at once for an engine with room for a few, under four controls and none."""
    before = starved.metric("vllm:num_preemptions_total")
    asks, longer = [], 3 if world.runner == V1 else 1  # an interpreter runs V2's kernels
    for number, prompt in enumerate(prompts(world, 24, seed=1)):
        control = (*CONTROLS, None)[number % 5]
        options = {"tokens": 20 + longer * number, "body": {"ignore_eos": True}, "drafts": world.drafts}
        strength = (1.0, -1.0, 0.5)[number % 3]
        options["routing"] = world.routings[number % len(world.routings)]
        asks.append(
            ask_for(world, control, prompt, strength=strength, **options)
            if control
            else Ask(prompt, **options)
        )
    choices = complete_all(starved, asks)
    assert starved.metric("vllm:num_preemptions_total") > before
    assert sum(check(world, ask, choice) for ask, choice in zip(asks, choices, strict=True)) > 700


def test_a_prompt_that_is_read_in_pieces_is_counted_once(world, starved):
    """As many shifted rows as tokens, though the rows of a half-read prompt reach the processor too."""
    long = long_prompt(world, 4 * BUDGET)
    options = {"routing": "path", "body": {"ignore_eos": True}, "drafts": world.drafts}
    ask = ask_for(world, "other", long, tokens=12, **options)
    before = counted(world, starved, "trimtab_controlled_tokens_total", control="other")
    check(world, ask, *complete(starved, ask))
    rows = counted(world, starved, "trimtab_controlled_tokens_total", control="other") - before
    assert 12 <= rows <= 12 * (1 + world.drafts)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_prefix_that_is_cached_changes_nothing(world, server, control):
    """The same prompt twice, with other controls: only the target's keys and values are shared."""
    prompt = long_prompt(world, 3 * BLOCK + 5)
    ask = ask_for(world, control, prompt, tokens=8)
    complete(server, ask)
    before = server.metric("vllm:prefix_cache_hits_total")
    check(world, ask, *complete(server, ask))
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_every_choice_of_several_is_controlled(world, server):
    """`n` = 4, sampled, from one prompt."""
    ask = ask_for(world, "other", prompts(world, 1)[0], body={"n": 4, "seed": 5, "temperature": 1.0})
    choices = complete(server, ask)
    assert len({tuple(choice.token_ids) for choice in choices}) == 4
    for choice in choices:
        check(world, ask, choice)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(world, server):
    """Whoever else is in the batch."""
    asks = [
        ask_for(world, CONTROLS[i % 4], prompt, body={"seed": i, "temperature": 1.0})
        for i, prompt in enumerate(prompts(world, 8, seed=4))
    ]
    alone = [complete(server, ask)[0].token_ids for ask in asks]
    assert [choice.token_ids for choice in complete_all(server, asks)] == alone


def penalized(prompt: list[int], *, presence: float = 0, frequency: float = 0, repetition: float = 1) -> Any:
    """As vLLM defines penalties: repetition over prompt and output, the others over the output."""

    def adjust(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        seen = torch.tensor(sorted({*prompt, *output}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits))
        return logits - frequency * counts - presence * (counts > 0)

    return adjust


@pytest.mark.parametrize("control", ["other", "bytes"])
@pytest.mark.parametrize(
    "penalties", [{"presence": 1.5}, {"frequency": 0.8}, {"repetition": 1.4}], ids=lambda p: next(iter(p))
)
def test_penalties_act_beside_the_shift(world, server, control, penalties):
    """On V1 after the shift; on V2 before, so that the control sees the penalized logits."""
    ((name, value),) = penalties.items()
    ask = ask_for(world, control, prompts(world, 1, seed=5)[0], body={f"{name}_penalty": value})
    (choice,) = complete(server, ask)
    penalty = penalized(ask.prompt, **penalties)
    if world.runner == V2:
        check(world, replace(ask, seen=penalty), choice)
    else:
        check(world, ask, choice, penalty)


def test_temperature_scales_the_controlled_distribution(world, server):
    """Target and shift alike."""
    body = {"temperature": 0.6, "seed": 1}
    ask = ask_for(world, "other", prompts(world, 1, seed=6)[0], body=body)
    check(world, ask, *complete(server, ask), lambda logits, _: logits / 0.6)


def test_a_logit_bias_is_added_to_the_shift(world, server):
    """The two are sums."""

    def biased(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        logits[300] += 6.0
        logits[301] -= 6.0
        return logits

    body = {"logit_bias": {"300": 6.0, "301": -6.0}}
    ask = ask_for(world, "pair", prompts(world, 1, seed=7)[0], seen=biased, body=body)
    check(world, ask, *complete(server, ask))


def masked(ids: list[int], until: int = 10**9) -> Any:
    def adjust(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        if len(output) < until:
            logits[ids] = -torch.inf
        return logits

    return adjust


def test_an_answer_ends_no_sooner_than_it_may(world, server):
    """`min_tokens`, with an end that the bias makes likely."""
    eos = world.model.tokenizer.eos_token_id

    def seen(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        logits[eos] += 40.0
        return masked([eos], until=9)(logits, output)

    body = {"min_tokens": 9, "logit_bias": {str(eos): 40.0}}
    ask = ask_for(world, "other", prompts(world, 1, seed=8)[0], seen=seen, body=body)
    (choice,) = complete(server, ask)
    assert len(choice.token_ids) == 10
    check(world, ask, choice)


def test_a_bad_word_is_never_said(world, server):
    """However much the control wants it."""
    ask = ask_for(world, "other", prompts(world, 1, seed=9)[0])
    (choice,) = complete(server, ask)
    tokenizer = world.model.tokenizer
    texts = {token: tokenizer.decode([token]) for token in choice.token_ids}
    word = next(t for i, t in texts.items() if t.strip().isalpha() and tokenizer.encode(t.strip()) == [i])
    (without,) = complete(server, ask_for(world, "other", ask.prompt, body={"bad_words": [word.strip()]}))
    bad = [
        ids[0] for ids in (tokenizer.encode(w) for w in (word.strip(), " " + word.strip())) if len(ids) == 1
    ]
    assert without.token_ids != choice.token_ids
    assert not {*bad} & {*without.token_ids}
    check(world, replace(ask, seen=masked(bad)), without)


def test_an_answer_ends_before_its_stop_string(world, server):
    """And the control sees what comes before it."""
    ask = ask_for(world, "other", prompts(world, 1, seed=10)[0], tokens=40, body={"ignore_eos": True})
    (whole,) = complete(server, ask)
    ascii_ = [i for i, c in enumerate(whole.text) if i > 20 and c.isascii() and c.isalpha()]
    stop = whole.text[ascii_[0]]
    (short,) = complete(server, ask_for(world, "other", ask.prompt, tokens=40, body={"stop": [stop]}))
    assert short.finish_reason == "stop"
    assert short.text == whole.text[: whole.text.index(stop)]
    assert short.token_ids == whole.token_ids[: len(short.token_ids)]


@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_a_guard_shifts_only_what_the_target_finds_likely(world, server, top_k):
    """The rest of the distribution stays the target's."""
    ask = ask_for(world, "chars", prompts(world, 1, seed=11)[0], strength=2.0, top_k=top_k, tokens=12)
    check(world, ask, *complete(server, ask))


@pytest.mark.parametrize("control", ["chars", "pair"])
def test_a_control_lets_go_and_spares_what_the_target_finds_unlikely(world, server, control):
    """`until` counts generated tokens; `min_p` is a share of the likeliest token's probability."""
    options = {"min_p": 0.2, "until": 7, "strength": 2.0, "tokens": 12, "body": {"ignore_eos": True}}
    ask = ask_for(world, control, prompts(world, 1, seed=21)[0], **options)
    before = counted(world, server, "trimtab_controlled_tokens_total", control=control)
    check(world, ask, *complete(server, ask))
    assert counted(world, server, "trimtab_controlled_tokens_total", control=control) - before == 7


@pytest.mark.parametrize("control", CONTROLS)
def test_text_that_splits_characters_and_has_special_tokens_reaches_the_control_whole(world, server, control):
    """Emoji, Chinese, combining marks, bytes that are no text, ends of turn: sampled from nothing else."""
    tokenizer = world.model.tokenizer
    pieces = {i for text in ("🙂", "語", "e\u0301", "ü", " a") for i in tokenizer.encode(text)}
    pieces |= {tokenizer.eos_token_id, tokenizer.bos_token_id}
    pieces |= {token for token, data in enumerate(world.model.bytes) if data and data[0] >= 0x80}
    allowed = sorted(pieces)[:60]
    body = {"allowed_token_ids": allowed, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    others = sorted({*range(world.model.network.config.vocab_size)} - {*allowed})
    ask = ask_for(world, control, prompts(world, 1, seed=12)[0], tokens=70, seen=masked(others), body=body)
    (choice,) = complete(server, ask)
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} & {*choice.token_ids}
    assert sum(not _is_text(world.model.bytes[token]) for token in choice.token_ids) > 10
    check(world, ask, choice)


def _is_text(data: bytes | None) -> bool:
    try:
        return bool((data or b"").decode()) or data is None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("routing", ["pm-mined", "path", "pieces"])
def test_a_context_past_the_window_keeps_its_beginning_and_its_end(world, server, routing):
    """A control with a window of 64 steers an answer of 150 tokens, and says that it forgot."""
    if routing not in world.routings:
        pytest.skip(f"{routing} is not on {world.runner}")
    before = server.metric("trimtab_context_truncations_total", control="chars")
    options = {"tokens": 150, "routing": routing, "body": {"ignore_eos": True}}
    ask = ask_for(world, "chars", prompts(world, 1, seed=13)[0], **options)
    check(world, ask, *complete(server, ask))
    assert server.metric("trimtab_context_truncations_total", control="chars") > before


@pytest.mark.parametrize("control", CONTROLS)
def test_without_a_prompt_of_its_own_a_control_reads_the_text_of_the_targets(world, server, control):
    """As without the gateway."""
    prompt = prompts(world, 1, seed=14)[0]
    ask = Ask(prompt, control, tokens=12)
    own = world.references[f"{control} path"].prompt(prompt)
    check(world, Ask(prompt, control, own=own, tokens=12), *complete(server, ask))


def test_a_prompt_of_one_special_token_is_no_text_for_the_control(world, server):
    """The control begins with its own beginning of a text."""
    prompt = [world.model.tokenizer.bos_token_id]
    ask = Ask(prompt, "other", tokens=12)
    own = [world.control("other").tokenizer.bos_token_id]
    check(world, Ask(prompt, "other", own=own, tokens=12), *complete(server, ask))


def test_an_abort_in_mid_stream_gives_every_block_back(world, server):
    """As soon as the client is gone, whatever else runs."""
    before = server.metric("trimtab_controlled_tokens_total", control="other")
    prompt = prompts(world, 1, seed=15)[0]
    tokens, answers = tiny.CONTEXT - len(prompt), 8 * MOST  # of which MOST run at once: it takes many seconds
    body = {"ignore_eos": True, "n": answers, "temperature": 1.0, "seed": 3}
    ask = ask_for(world, "other", prompt, tokens=tokens, body=body)
    with client(server) as api, api.completions.create(**ask.request(), stream=True) as stream:
        for _, chunk in zip(range(3), stream, strict=False):
            assert chunk.choices
        assert server.metric("trimtab_blocks_in_use") > 0
    deadline = time.monotonic() + 10
    while (used := server.metric("trimtab_blocks_in_use")) and time.monotonic() < deadline:
        complete(server, Ask(ask.prompt, tokens=2))  # an idle engine takes no step
    assert used == 0
    assert 3 <= server.metric("trimtab_controlled_tokens_total", control="other") - before < answers * tokens


def test_the_shifts_of_several_controls_are_summed(world, server):
    """Each at its own strength, with its own prompt or the target's, and its own guard, which sees the logits
    of the target alone."""
    prompt = prompts(world, 1, seed=16)[0]
    given = [("other", 1.0, 0), ("bytes", -0.5, 7), ("pair", 0.7, 0)]
    own = {name: own_prompt(world, name) for name in ("other", "bytes")}
    xargs = {
        "trimtab_control": [name for name, _, _ in given],
        "trimtab_strength": [strength for _, strength, _ in given],
        "trimtab_top_k": [top_k for _, _, top_k in given],
        "trimtab_prompt": own["other"] + own["bytes"],
        "trimtab_prompt_lengths": [len(own["other"]), len(own["bytes"]), -1],
    }
    ask = Ask(prompt, tokens=24)
    request = ask.request()
    request["extra_body"]["vllm_xargs"] = xargs
    with client(server) as api:
        choices = api.completions.create(**request).choices
    output = choices[0].token_ids
    own["pair"] = world.references["pair path"].prompt(prompt)
    added = torch.zeros(len(output), len(world.model.logits(prompt)))
    plain = expected_logits(world, ask, output)
    for name, strength, top_k in given:
        steered = Ask(prompt, name, strength, own[name], top_k)
        for position, logits in enumerate(expected_logits(world, steered, output)):
            added[position] += logits - plain[position]
    check(world, ask, choices[0], lambda logits, so_far: logits + added[len(so_far)])


@pytest.mark.parametrize("control", CONTROLS)
def test_a_grammars_mask_is_part_of_the_distribution_in_which_a_node_decides(world, server, control):
    """The tokens that it leaves are as likely together as the target finds them."""
    letters = re.compile(rb"[a-z ]+")
    end = world.model.tokenizer.eos_token_id
    texts = [*enumerate(world.model.bytes)]
    others = [token for token, data in texts if token != end and not (data and letters.fullmatch(data))]
    others += range(len(texts), world.model.network.config.vocab_size)
    body = {"structured_outputs": {"regex": "[a-z ]*"}, "ignore_eos": True}
    prompt = prompts(world, 1, seed=20)[0]
    ask = ask_for(world, control, prompt, routing="path", seen=masked(others), tokens=16, body=body)
    check(world, ask, *complete(server, ask))


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ship", "boat"]},
        "sails": {"enum": [1, 2, 3]},
        "fast": {"type": "boolean"},
    },
    "required": ["kind", "sails", "fast"],
    "additionalProperties": False,
}


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return (
        [*value] == ["kind", "sails", "fast"]
        and value["kind"] in ("ship", "boat")
        and value["sails"] in (1, 2, 3)
        and isinstance(value["fast"], bool)
    )


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("strength", [5.0, -5.0])
def test_structured_output_stays_valid_at_any_strength(world, server, control, strength):
    """The grammar's mask wins over the shift."""
    schema = {"name": "vessel", "schema": SCHEMA}
    with client(server) as api:
        answer = api.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Which vessel?"}],
            max_tokens=100,
            temperature=1.0,
            seed=0,
            response_format={"type": "json_schema", "json_schema": schema},
            extra_body={"vllm_xargs": {"trimtab_control": control, "trimtab_strength": strength}},
        )
    assert is_valid(answer.choices[0].message.content)


def test_a_tool_is_called_with_valid_arguments(world, server):
    """Under control, at strength 5; of the whitespace that JSON allows, a random model would not tire."""
    tool = {"type": "function", "function": {"name": "launch", "parameters": SCHEMA, "strict": True}}
    blank = [token for token, data in enumerate(world.model.bytes) if data and data != data.strip()]
    with client(server) as api:
        answer = api.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Launch it"}],
            max_tokens=100,
            temperature=0,
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "launch"}},
            logit_bias={str(token): -100 for token in blank},
            extra_body={"vllm_xargs": {"trimtab_control": "other", "trimtab_strength": 5.0}},
        )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "launch"
    assert is_valid(call.function.arguments)


def test_a_wrong_request_is_a_400_and_costs_nobody_else_theirs(world, server):
    """Each with the key and the value that was wrong."""
    prompt = prompts(world, 1)[0]
    for xargs, said in (
        ({"trimtab_control": "nobody"}, "no control 'nobody' here, there is: "),
        ({"trimtab_control": "other", "trimtab_strength": 11}, "trimtab_strength"),
        ({"trimtab_control": "other", "trimtab_top_k": 1025}, "trimtab_top_k"),
        ({"trimtab_control": "other", "trimtab_prompt": [600]}, "token 600 is not below the 600"),
    ):
        with client(server) as api, pytest.raises(BadRequestError, match=said):
            api.completions.create(model="m", prompt=prompt, extra_body={"vllm_xargs": xargs})
    check(world, ask := ask_for(world, "other", prompt), *complete(server, ask))


def test_log_probabilities_of_the_prompt_are_refused_under_a_control(world, server):
    """They are the uncontrolled model's. Without a control they come, and with one all else does."""
    prompt = prompts(world, 1)[0]
    controlled = {"vllm_xargs": {"trimtab_control": "other", "trimtab_strength": 5.0}}
    with client(server) as api:
        complete_it = partial(api.completions.create, model="m", prompt=prompt, max_tokens=2, temperature=0)
        for asked, extra in (
            ({}, {"prompt_logprobs": 0}),
            ({}, {"prompt_logprobs": 5}),
            ({"echo": True, "logprobs": 0}, {}),
        ):
            with pytest.raises(BadRequestError, match="without the control") as caught:
                complete_it(**asked, extra_body=controlled | extra)
            assert caught.value.param == "prompt_logprobs"
            assert complete_it(**asked, extra_body=extra).choices
        assert complete_it(echo=True, extra_body=controlled).choices
        messages = [{"role": "user", "content": "Tell me a story."}]
        with pytest.raises(BadRequestError, match="without the control"):
            api.chat.completions.create(model="m", messages=messages, extra_body=controlled | {"echo": True})


@pytest.mark.parametrize("control", ["other", "chars"])
def test_a_control_reads_a_cut_prompt_as_the_target_does(world, server, control):
    """Without a prompt of its own it reads the text of what the target reads, as if that was sent alone."""
    prompt = long_prompt(world, 40)
    cut = Ask(prompt, control, strength=3.0, body={"truncate_prompt_tokens": 12})
    answer = complete(server, cut)
    assert answer[0].prompt_token_ids == prompt[-12:]
    assert dump(answer) == dump(complete(server, replace(cut, prompt=prompt[-12:], body={})))
    assert dump(answer) != dump(complete(server, replace(cut, body={})))


def test_chosen_tokens_have_the_log_probabilities_of_the_controlled_distribution(world, server):
    """Greedy and sampled ones."""
    for temperature in (0.0, 1.0):
        body = {"temperature": temperature, "seed": 4, "logprob_token_ids": [5, 6, 7]}
        ask = ask_for(world, "other", prompts(world, 1, seed=18)[0], strength=3.0, body=body)
        (answer,) = complete(server, ask)
        assert all(
            {f"token_id:{token}" for token in (5, 6, 7)} <= {*top} for top in answer.logprobs.top_logprobs
        )
        check(world, ask, answer)


def test_off_and_strength_zero_are_to_the_bit_those_of_a_server_without_the_plugin(
    world, server, tmp_path_factory
):
    """Tokens and logprobs, greedy and sampled; and an empty prompt is answered alike."""
    bodies = [{"seed": i, "temperature": t} for i, t in enumerate((0.0, 0.7, 1.0, 1.0))]
    asked = list(zip(prompts(world, len(bodies), seed=16), bodies, strict=True))
    directory = tmp_path_factory.mktemp("plain")
    with engine(world.target, directory, *ARGS, *ROOMY, runner=world.runner) as plain:
        for prompt, body in asked:
            expected = dump(complete(plain, Ask(prompt, body=body)))
            assert dump(complete(server, Ask(prompt, body=body))) == expected
            assert (
                dump(complete(server, ask_for(world, "other", prompt, strength=0.0, body=body))) == expected
            )
        assert answer_to_nothing(plain) == answer_to_nothing(server)


def dump(choices: list[Any]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.logprobs.token_logprobs, c.logprobs.top_logprobs) for c in choices]


def answer_to_nothing(server: Engine) -> str:
    """What becomes of an empty prompt, whether that is text or an error."""
    with client(server) as api:
        try:
            return api.completions.create(model="m", prompt="", max_tokens=4, temperature=0).choices[0].text
        except BadRequestError as error:
            return str(error)


def test_every_rank_of_two_shifts_alike(world, tmp_path_factory):
    """Tensor parallel size 2: what comes out is what one rank gives."""
    directory = tmp_path_factory.mktemp("parallel")
    args = ("--tensor-parallel-size", "2", "--max-model-len", str(tiny.CONTEXT))
    settings = plugin(world, directory)
    with engine(world.target, directory, *args, plugin=settings, runner=world.runner, cores="0|1") as server:
        asks = [
            ask_for(world, CONTROLS[i % 4], prompt, tokens=16)
            for i, prompt in enumerate(prompts(world, 6, seed=17))
        ]
        tokens = sum(
            check(world, ask, choice) for ask, choice in zip(asks, complete_all(server, asks), strict=True)
        )
        assert counted(world, server, "trimtab_controlled_tokens_total") == tokens
        steps = server.metric("trimtab_steps_total")
        assert server.metric("trimtab_shift_kl_nats_count") == steps // DEFAULT_KL_EVERY > 0
