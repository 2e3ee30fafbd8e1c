"""The distributions that a control is added to, and that it is held to: those of a frozen model, or none."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import log_softmax

from trimtab_training.control.examples import View, collate


class Reference(Protocol):
    """Gives log-probabilities at the answers of views."""

    def log_probs(self, views: Sequence[View]) -> Tensor:
        """float32 [answer tokens of all views, vocabulary]."""
        ...


class LiveTemplate:
    """A frozen model that is run whenever it is asked."""

    def __init__(self, model: Module, pad_id: int, device: torch.device, vocabulary: int) -> None:
        """Args: vocabulary: the number of logits that the control shares."""
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._pad_id = pad_id
        self._device = device
        self._vocabulary = vocabulary

    @torch.no_grad()
    def log_probs(self, views: Sequence[View]) -> Tensor:
        logits = answer_logits(self._model, views, self._pad_id, self._device)
        return log_softmax(logits[:, : self._vocabulary], dim=-1)


class NoTemplate:
    """No template: every token is equally likely, so the loss is that of the trained model alone."""

    def __init__(self, device: torch.device, vocabulary: int) -> None:
        """Args: vocabulary: the number of logits of the trained model."""
        self._zero = torch.zeros((1, 1), device=device)
        self._vocabulary = vocabulary

    def log_probs(self, views: Sequence[View]) -> Tensor:
        """Zeros: log-probabilities up to a constant, which the softmax of the sum removes."""
        return self._zero.expand(sum(len(view.positions) for view in views), self._vocabulary)


def answer_logits(model: Module, views: Sequence[View], pad_id: int, device: torch.device) -> Tensor:
    """The logits from which each answer token is drawn: float32 [answer tokens of all views, vocabulary]."""
    batch = collate(views, pad_id)
    ids, rows = batch.ids.to(device), batch.rows.to(device)
    columns, keep = batch.columns, {}
    if _keeps_logits(model):
        kept, columns = torch.unique(columns, return_inverse=True)
        keep["logits_to_keep"] = kept.to(device)
    logits = model(input_ids=ids, use_cache=False, **keep).logits
    found: Tensor = logits[rows, columns.to(device)].float()
    return found


def _keeps_logits(model: Module) -> bool:
    """Whether the model computes only those logits that it is asked for."""
    inner: Module = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
