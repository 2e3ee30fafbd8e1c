"""A stand-in for vLLM's V2 model runner, which no CPU build can run: its state and contexts are vLLM's own
classes, its kernels' effect on them is written out in plain Python.

Requests are prefilled in chunks, preempted, resumed and finished; slots are used again, rows change their
order at every step, and drafts are accepted by chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    build_custom_logits_processors,
)
from vllm.v1.worker.gpu.states import RequestState

from reference import Model, Segmented, SegmentedPath

ADAPTER = "trimtab_processors:ControlProcessor"
MAX_LENGTH = 400


def configuration(directory, controls, tables, *, drafts=0, **plugin):
    """As much of a VllmConfig as the adapter reads."""
    own = {"controls": {name: str(place) for name, place in controls.items()}, "tables": str(tables)}
    return SimpleNamespace(
        additional_config={"trimtab": own | plugin},
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
        model_config=SimpleNamespace(
            served_model_name=["target"],
            tokenizer=str(directory),
            tokenizer_revision=None,
            logprobs_mode="processed_logprobs",
            get_vocab_size=lambda: Model(directory).network.config.vocab_size,
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
    )


def request_state(slots: int, vocabulary: int, drafts: int = 0) -> RequestState:
    """vLLM's own, with its buffers on the CPU."""
    with mock.patch.object(buffer_utils, "is_uva_available", return_value=False):
        return RequestState(slots, MAX_LENGTH, MAX_LENGTH, drafts, vocabulary, torch.device("cpu"))


@dataclass(eq=False)
class Job:
    """One request, from its arrival to its end."""

    name: str
    prompt: list[int]
    xargs: dict | None
    tokens: int
    """How many it wants."""
    output: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def history(self) -> list[int]:
        return self.prompt + self.output


@dataclass(frozen=True)
class Row:
    """A row of logits, before and after the processor."""

    job: Job
    output: list[int]
    """What was generated before it, drafts included."""
    sampled: bool
    """Whether a token is sampled from it: not while its request is half prefilled."""
    before: torch.Tensor
    after: torch.Tensor


class Runner:
    """The engine around one processor."""

    def __init__(self, config, target: Model, *, slots: int, drafts: int = 0, parts: int = 1, seed=0) -> None:
        """Load the processor as vLLM does.

        Args:
            config: vLLM's configuration.
            target: the model that is served.
            slots: the requests that run at once.
            drafts: the draft tokens that a request has at most in a step.
            parts: into how many calls of `apply` a step is cut, as large verifications are.
            seed: of what is left to chance.
        """
        self.target, self.drafts, self.parts = target, drafts, parts
        self.random = random.Random(seed)
        self.vocabulary = target.network.config.vocab_size
        self.states = request_state(slots, self.vocabulary, drafts)
        (self.processor,) = build_custom_logits_processors(config, self.states, False, [ADAPTER])
        self.steered = np.zeros(slots, dtype=bool)
        self.running: list[Job] = []

    def add(self, job: Job) -> None:
        states = self.states
        states.add_request(job.name, len(job.prompt), job.history, 0, job.tokens)
        job.computed = 0
        slot = self.slot(job)
        params = SamplingParams(extra_args=job.xargs)
        self.steered[slot] = self.processor.add_request(slot, params)
        self.running.append(job)

    def remove(self, job: Job) -> None:
        self.running.remove(job)
        self.states.remove_request(job.name)

    def slot(self, job: Job) -> int:
        return self.states.req_id_to_index[job.name]

    def flush(self) -> None:
        """What `apply_staged_writes` does, whose kernel needs a GPU; and then the processor's own."""
        states = self.states
        states.prompt_len.copy_to_uva()
        states.prefill_len.copy_to_uva()
        for tensor in (states.total_len, states.all_token_ids, states.num_computed_tokens):
            start = 0
            rows = tensor.gpu.view(len(tensor.gpu), -1)
            for index, column, end in zip(
                tensor._staged_write_indices,
                tensor._staged_write_starts,
                tensor._staged_write_cu_lens,
                strict=True,
            ):
                contents = torch.tensor(tensor._staged_write_contents[start:end], dtype=tensor.dtype)
                rows[index, column : column + end - start] = contents
                start = end
            tensor.clear_staged_writes()
        self.processor.apply_staged_writes()

    def step(self) -> list[Row]:
        """One step of all that run."""
        self.flush()
        jobs = self.random.sample(self.running, len(self.running))
        chains = [self._chain(job) for job in jobs]
        rows: list[Row] = []
        for chunk in np.array_split(np.arange(len(jobs)), self.parts):
            if len(chunk):
                rows += self._apply([(jobs[i], chains[i]) for i in chunk])
        for job in jobs:
            self._sample(job, [row for row in rows if row.job is job])
        return rows

    def _chain(self, job: Job) -> list[int]:
        """The drafts of this step; and how far the target computes in it."""
        left = len(job.history) - job.computed
        if left > 1:
            job.computed += self.random.choice([left, max(left // 2, 1)])
            return []
        job.computed += 1
        count = self.random.randint(0, self.drafts)
        return [self.random.randrange(-1, self.vocabulary) for _ in range(count)]

    def _apply(self, members: list[tuple[Job, list[int]]]) -> list[Row]:
        expanded, offsets, inputs, heads = [], [], [], []
        for job, drafts in members:
            for offset in range(len(drafts) + 1):
                known = (job.history[: job.computed] + drafts)[: job.computed + offset]
                heads.append((job, known))
                expanded.append(self.slot(job))
                offsets.append(offset)
                inputs.append(known[-1])
        before = torch.stack([self.target.logits([max(t, 0) for t in known]) for _, known in heads])
        slots = np.array([self.slot(job) for job, _ in members], dtype=np.intp)
        lengths = [job.computed + len(drafts) for job, drafts in members]
        after = before.clone()
        if self.steered[slots].any():  # else vLLM calls no processor
            context = LogitsContext(
                expanded_idx_mapping=torch.tensor(expanded, dtype=torch.int32),
                idx_mapping=torch.tensor(slots, dtype=torch.int32),
                idx_mapping_np=slots,
                expanded_local_pos=torch.tensor(offsets, dtype=torch.int32),
                input_ids=torch.tensor(inputs, dtype=torch.int32),
                pos=torch.tensor([len(known) - 1 for _, known in heads]),
                seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
            )
            after = self.processor.apply(after, context)
        return [
            Row(job, known[len(job.prompt) :], len(known) >= len(job.history), *logits)
            for (job, known), *logits in zip(heads, before, after, strict=True)
        ]

    def _sample(self, job: Job, rows: list[Row]) -> None:
        """Accept drafts by chance, and sample after them, on the device as vLLM's `post_update` does."""
        if not rows[0].sampled:
            return
        accepted = 0
        while accepted + 1 < len(rows) and rows[accepted + 1].output[-1] >= 0 and self.random.random() < 0.6:
            accepted += 1
        drafts = rows[-1].output[len(job.output) :]
        new = [*drafts[:accepted], int(rows[accepted].after.argmax())]
        slot, total = self.slot(job), len(job.history)
        self.states.all_token_ids.gpu[slot, total : total + len(new)] = torch.tensor(new, dtype=torch.int32)
        self.states.total_len.gpu[slot] += len(new)
        job.output += new
        job.computed = len(job.history) - 1

    def run(self, jobs: list[Job]) -> Iterator[list[Row]]:
        """Run `jobs` to their end, with preemptions, and yield each step's rows."""
        waiting = list(reversed(jobs))
        while waiting or self.running:
            for job in list(self.running):
                done = len(job.output) >= job.tokens
                if done or self.random.random() < 0.07:
                    self.remove(job)
                    if not done:
                        waiting.append(job)
            while waiting and self.states.free_indices and self.random.random() < 0.6:
                self.add(waiting.pop())
            if self.running:
                yield self.step()
            else:
                self.flush()


class Segments:
    """The slow reference of alignment in mode `segments`, for contexts that a test writes itself."""

    def __init__(
        self, target: Model, control: Model, routing: type[Segmented] = SegmentedPath, **options
    ) -> None:
        self.reference = routing(target, control, **options)
        self.bytes = target.bytes
        self.segment = self.reference.segment

    def context(self, prompt: list[int], own: list[int] | None, output: list[int]) -> list[int]:
        """The control's tokens: its own prompt or the target's, and what was generated."""
        own = self.reference.prompt(prompt) if own is None else own
        return own + [piece for token in output for piece in self.segment(token)]

    def shift(
        self, context: list[int], strength: float = 1.0, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is added to the target's `logits`, of which each is 0 if none are given."""
        if logits is None:
            logits = torch.zeros(self.reference.target.network.config.vocab_size)
        return self.reference.shift(context, strength, logits)

    def text(self, tokens: list[int]) -> bytes:
        """What control tokens spell."""
        return b"".join(self.reference.control.bytes[token] or b"" for token in tokens)
