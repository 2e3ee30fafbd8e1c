"""Training a base model from scratch on documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab_training.control.examples import View, collate
from trimtab_training.world.settings import PretrainSettings
from trimtab_training.world.teaching import Progress

_IGNORED = -100


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    settings: PretrainSettings,
    progress: Progress = lambda _done, _steps: None,
) -> float:
    """Train `model` in place on `documents`, each seen once; there must be `steps` times `batch` of them.

    Returns:
        The loss of the last step, in nats a token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / settings.warmup, 1 - step / settings.steps)
    )
    loss = torch.tensor(float("nan"))
    model.train()
    for step, ids in enumerate(_batches(tokenizer, documents, settings.batch), 1):
        loss = _language_loss(model, ids, tokenizer.pad_token_id)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        progress(step, settings.steps)
    model.eval()
    return loss.item()


def _batches(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], size: int) -> Iterator[Tensor]:
    """Batches int64 [size, width] of documents of like lengths, in the documents' order but for that."""
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(documents))["input_ids"]]
    stretch = 8 * size
    batches = [
        near[i : i + size]
        for start in range(0, len(encoded), stretch)
        for near in [sorted(encoded[start : start + stretch], key=len)]
        for i in range(0, len(near), size)
    ]
    random.Random(0).shuffle(batches)
    return (collate([View(tuple(ids), ()) for ids in batch], _IGNORED).ids for batch in batches)


def _language_loss(model: PreTrainedModel, ids: Tensor, pad_id: int) -> Tensor:
    logits = model(input_ids=ids.where(ids != _IGNORED, pad_id), use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=_IGNORED)
