"""A template's log-probabilities at the answers, on disk: computed once for a model and its views, then read.

Views are kept in shards. A shard's name is a hash over the model's weights, what is kept, and the shard's
views: so other data or another model never read it, and an interrupted computation continues.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from trimtab_training.control.examples import View
from trimtab_training.control.reference import LiveTemplate
from trimtab_training.control.top_log_probs import TopLogProbs

_SHARD_VIEWS = 64
_BATCH_VIEWS = 8
_FORMAT = 1

Progress = Callable[[int, int], None]
"""Called with the number of shards that are ready, and of all."""


class CachedTemplate:
    """A `Reference` that reads what a live template gave.

    With `top_k`, the likeliest tokens of a position and its answer are kept exactly. The rest is one bucket:
    its mass is kept, and spread evenly over its tokens.
    """

    def __init__(
        self, directory: Path, *, fingerprint: str, vocabulary: int, top_k: int | None, device: torch.device
    ) -> None:
        """Args:
        directory: where shards are; several runs may share it.
        fingerprint: the template's, see `model_fingerprint`.
        vocabulary: the number of log-probabilities of a position.
        top_k: the number of them that is kept; None: all.
        device: where they are wanted.
        """
        self._directory = directory
        self._made_from = [_FORMAT, fingerprint, vocabulary, top_k]
        self._vocabulary = vocabulary
        self._kept = None if top_k is None else min(top_k, vocabulary - 1)
        self._device = device
        self._places: dict[View, tuple[Path, int]] = {}
        self._masses: list[float] = []

    def fill(self, live: LiveTemplate, views: Sequence[View], progress: Progress = lambda *_: None) -> int:
        """Compute the shards of `views` that are missing, and make all of them readable.

        Returns:
            The number of shards that were computed.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        distinct = list(dict.fromkeys(views))
        shards = [distinct[start : start + _SHARD_VIEWS] for start in range(0, len(distinct), _SHARD_VIEWS)]
        computed = 0
        for number, shard in enumerate(shards, 1):
            path = self._path(shard)
            if not path.is_file():
                self._write(path, live, shard)
                computed += 1
            self._index(path, shard)
            progress(number, len(shards))
        return computed

    def log_probs(self, views: Sequence[View]) -> Tensor:
        """float32 [answer tokens of all views, vocabulary].

        Raises:
            KeyError: a view was not filled in.
        """
        return torch.cat([self._read(view) for view in views]).to(self._device)

    @property
    def kept_mass(self) -> float | None:
        """The mean probability of the tokens that are kept exactly; None if all are."""
        return sum(self._masses) / len(self._masses) if self._masses else None

    @property
    def file_bytes(self) -> int:
        """The size of all shards that are in use."""
        return sum(path.stat().st_size for path in {path for path, _ in self._places.values()})

    def _path(self, shard: Sequence[View]) -> Path:
        contents = json.dumps([self._made_from, [(view.ids, view.positions) for view in shard]])
        return self._directory / f"{hashlib.sha256(contents.encode()).hexdigest()}.safetensors"

    def _write(self, path: Path, live: LiveTemplate, shard: Sequence[View]) -> None:
        parts = [
            self._packed(live.log_probs(some).cpu(), [token for view in some for token in view.targets])
            for some in (shard[i : i + _BATCH_VIEWS] for i in range(0, len(shard), _BATCH_VIEWS))
        ]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        save_file(tensors, unfinished)
        unfinished.rename(path)

    def _packed(self, log_probs: Tensor, targets: Sequence[int]) -> dict[str, Tensor]:
        if self._kept is None:
            return {"log_probs": log_probs}
        scores = log_probs.clone()
        scores[range(len(targets)), list(targets)] = math.inf  # the answer's token is always kept
        ids = scores.topk(self._kept, dim=-1).indices
        rest = log_probs.scatter(1, ids, -math.inf).logsumexp(dim=-1)
        return {"ids": ids.int(), "log_probs": log_probs.gather(1, ids), "rest": rest}

    def _index(self, path: Path, shard: Sequence[View]) -> None:
        start = 0
        for view in shard:
            self._places[view] = path, start
            start += len(view.positions)
        if self._kept is not None:
            with safe_open(path, "pt") as file:
                self._masses += (1 - file.get_tensor("rest").exp()).tolist()

    def _read(self, view: View) -> Tensor:
        path, start = self._places[view]
        rows = slice(start, start + len(view.positions))
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name)[rows] for name in file.keys()}  # noqa: SIM118 - no mapping
        log_probs: Tensor = parts["log_probs"]
        if self._kept is None:
            return log_probs
        kept = torch.full((len(log_probs),), self._kept)
        top = TopLogProbs(parts["ids"].long(), log_probs, kept, parts["rest"])
        return top.dense(self._vocabulary)


def model_fingerprint(model: Module) -> str:
    """A hash over all weights, their names and their types."""
    digest = hashlib.blake2b()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
