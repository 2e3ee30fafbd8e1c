"""vLLM's persistent batch without vLLM's engine: what an adapter for its V1 model runner sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality

from reference import Model
from tiny import Family
from trimtab_processors.vllm_v1 import ControlProcessor


def configuration(family: Family, name: str, tables: Path, *, control_cpus=(), routing=None, **overrides):
    """As much of a VllmConfig as the adapter reads."""
    plugin = {
        "controls": {"control": str(family.control)},
        "tables": str(tables),
        "control_cpus": list(control_cpus),
        "routing": routing,
    }
    model = SimpleNamespace(
        served_model_name=name,
        tokenizer=str(family.targets[name]),
        tokenizer_revision=None,
        logprobs_mode="processed_logprobs",
        get_vocab_size=lambda: Model(family.targets[name]).network.config.vocab_size,
    )
    base = {
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "parallel_config": SimpleNamespace(rank=0, tensor_parallel_size=1),
        "additional_config": {"trimtab": plugin},
        "model_config": model,
    }
    return SimpleNamespace(**(base | overrides))


@dataclass(eq=False)
class Job:
    """A request; without a strength it names no control."""

    prompt: list[int]
    strength: float | None
    output: list[int]
    own: list[int] | None = None
    """The control's prompt; None: the text of the target's."""
    top_k: int | None = None
    routing: str | None = None

    @property
    def params(self) -> SamplingParams:
        xargs = {
            "trimtab_control": "control",
            "trimtab_strength": self.strength,
            "trimtab_prompt": self.own,
            "trimtab_top_k": self.top_k,
            "trimtab_routing": self.routing,
        }
        return SamplingParams(extra_args=xargs if self.strength is not None else None)


class Batch:
    """A persistent batch that changes as vLLM's does: new rows take freed places, then gaps are closed."""

    def __init__(self, processor: ControlProcessor) -> None:
        self.processor = processor
        self.rows: list[Job | None] = []
        self.builder = BatchUpdateBuilder()

    def change(self, leaving: Sequence[Job], joining: Sequence[Job]) -> None:
        for job in leaving:
            index = self.rows.index(job)
            self.rows[index] = None
            self.builder.removed_append(index)
        for job in joining:
            index = self.builder.pop_removed()
            if index is None:
                index = len(self.rows)
                self.rows.append(None)
            self.rows[index] = job
            self.builder.added.append((index, job.params, job.prompt, job.output))
        while None in self.rows:
            gap, last = self.rows.index(None), len(self.rows) - 1
            if self.rows[last] is not None:
                # A place that is taken again is not reported as removed.
                assert self.builder.pop_removed() == gap
                self.rows[gap] = self.rows[last]
                self.builder.moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
            self.rows.pop()

    def swap(self, i: int, j: int) -> None:
        self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
        self.builder.moved.append((i, j, MoveDirectionality.SWAP))

    def update(self) -> None:
        """Tell the adapter what has changed, and that a step begins."""
        self.processor.update_state(self.builder.get_and_reset(len(self.rows)))
