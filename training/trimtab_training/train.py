"""Training a control beside a frozen template (Wu et al., NeurIPS 2024, arXiv 2410.17599).

The loss is on the sum: `log_softmax(template + strength * control)`. The template is any causal language
model of transformers and is never changed; the control is another one with the same vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab_training.data import Item, Lesson, collate
from trimtab_training.objectives import OBJECTIVES, controlled_log_probs
from trimtab_training.settings import ControlSettings

Progress = Callable[[int, int], None]
"""Told the steps done and the steps in all."""


class Template:
    """A frozen model's log-probabilities at the answers of items, computed once for each item and kept."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.pad_id = pad_id
        self._model = model.eval()
        self._known: dict[Item, Tensor] = {}

    def log_probs(self, items: Sequence[Item]) -> Tensor:
        """float32 [answer tokens of all items, vocabulary]."""
        new = [item for item in dict.fromkeys(items) if item not in self._known]
        if new:
            found = functional.log_softmax(answer_logits(self._model, new, self.pad_id, grad=False), dim=-1)
            self._known.update(zip(new, torch.split(found, [len(item.answer) for item in new]), strict=True))
        return torch.cat([self._known[item] for item in items])


def answer_logits(model: PreTrainedModel, items: Sequence[Item], pad_id: int, *, grad: bool) -> Tensor:
    """The logits from which each answer token is drawn: float32 [answer tokens of all items, vocabulary]."""
    batch = collate(items, pad_id)
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=batch.ids, use_cache=False).logits
    rows: Tensor = logits[batch.rows, batch.columns].float()
    return rows


def lesson_loss(
    template: Tensor, shift: Tensor, strength: float, drawn: Sequence[tuple[Lesson, Sequence[Item]]]
) -> Tensor:
    """The mean loss over the answer tokens of all drawn items, each under its lesson's objective.

    Args:
        template: the template's log-probabilities, float32 [tokens, vocabulary], in the order of `drawn`.
        shift: the control's logits, of the same shape.
        strength: the factor on the shift.
        drawn: lessons and the items drawn from each.
    """
    controlled = controlled_log_probs(template, shift, strength)
    losses = []
    start = 0
    for lesson, items in drawn:
        targets = torch.tensor([token for item in items for token in item.answer])
        part = slice(start, start + len(targets))
        losses.append(OBJECTIVES[lesson.objective](controlled[part], template[part], targets))
        start = part.stop
    return torch.cat(losses).mean()


def train_control(
    template: Template,
    control: PreTrainedModel,
    lessons: Sequence[Lesson],
    settings: ControlSettings,
    progress: Progress = lambda _done, _steps: None,
) -> list[float]:
    """Train `control` in place.

    Returns:
        The loss of every step, in nats a token.
    """
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(control.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    history = []
    control.train()
    for step in range(settings.steps):
        drawn = [(lesson, rng.choices(lesson.items, k=lesson.per_step)) for lesson in lessons]
        items = [item for _, some in drawn for item in some]
        shift = answer_logits(control, items, template.pad_id, grad=True)
        loss = lesson_loss(template.log_probs(items), shift, rng.uniform(*settings.strengths), drawn)
        optimizer.zero_grad()
        torch.autograd.backward(loss + settings.shift_penalty * shift.square().mean())
        torch.nn.utils.clip_grad_norm_(control.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        progress(step + 1, settings.steps)
    control.eval()
    return history
