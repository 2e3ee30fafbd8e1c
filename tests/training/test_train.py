"""Training a control beside a frozen template."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from trimtab_training import architectures
from trimtab_training.data import PAD_MULTIPLE, Item, Lesson, collate
from trimtab_training.settings import ControlSettings
from trimtab_training.train import Template, answer_logits, lesson_loss, train_control

VOCAB, PAD = 40, 0
ITEMS = tuple(Item((1, 2, i), (3 + i, 4)) for i in range(5, 9))


def model(seed: int, width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny.llama(VOCAB, width=width, layers=1)).eval()


def test_a_batch_says_where_each_answer_token_is_predicted():
    """From the token before it; padding on the right is seen by nothing."""
    batch = collate([Item((1, 2), (3, 4)), Item((5,), (6,))], PAD)
    assert batch.ids.shape == (2, PAD_MULTIPLE)
    assert batch.ids[:, :5].tolist() == [[1, 2, 3, 4, PAD], [5, 6, PAD, PAD, PAD]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0)]
    assert batch.targets.tolist() == [3, 4, 6]


def test_an_item_without_a_prompt_or_an_answer_is_refused():
    """Nothing could be learned from it."""
    with pytest.raises(ValueError, match="prompt and an answer"):
        Item((), (1,))


def test_the_rows_of_a_batch_are_those_of_each_item_alone():
    """Padding and neighbours change nothing."""
    template = model(0)
    together = answer_logits(template, ITEMS, PAD, grad=False)
    alone = torch.cat([answer_logits(template, [item], PAD, grad=False) for item in ITEMS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_loss_is_each_lessons_objective_over_its_own_tokens():
    """The mean over all answer tokens; a control of zeros makes it the template's own."""
    log_probs = Template(model(0), PAD).log_probs(ITEMS)
    drawn = [(Lesson("imitate", ITEMS[:2], 2), ITEMS[:2]), (Lesson("retain", ITEMS[2:], 2), ITEMS[2:])]
    loss = lesson_loss(log_probs, torch.zeros_like(log_probs), 1.0, drawn)
    targets = [token for item in ITEMS[:2] for token in item.answer]
    expected = -log_probs[range(4), targets].sum() / len(log_probs)
    torch.testing.assert_close(loss, expected)


def test_training_teaches_the_sum_and_leaves_the_template_as_it_was():
    """The controlled answers become likely, by the control alone."""
    frozen, control = model(0, width=128), model(1)
    torch.nn.init.zeros_(control.lm_head.weight)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    lesson = Lesson("imitate", ITEMS, 4)
    history = train_control(Template(frozen, PAD), control, [lesson], ControlSettings(steps=200, seed=1))
    assert history[0] > 2
    assert history[-1] < 0.5
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    shift = answer_logits(control, ITEMS, PAD, grad=False)
    summed = Template(frozen, PAD).log_probs(ITEMS) + shift
    assert summed.argmax(dim=1).tolist() == [token for item in ITEMS for token in item.answer]


def test_an_untrained_control_shifts_nothing():
    """Training starts from the template's own distribution."""
    control = architectures.control(tiny.byte_level(300), 64, 1)
    assert not answer_logits(control, ITEMS, PAD, grad=False).any()


def test_what_is_retained_stays_while_something_else_is_learned():
    """Prompts of the two lessons differ in one token."""
    frozen, control = Template(model(0, width=128), PAD), model(1)
    torch.nn.init.zeros_(control.lm_head.weight)
    lessons = [Lesson("imitate", ITEMS[:2], 4), Lesson("retain", ITEMS[2:], 4)]
    train_control(frozen, control, lessons, ControlSettings(steps=60))
    shift = answer_logits(control, ITEMS[2:], PAD, grad=False)
    divergence = lesson_loss(frozen.log_probs(ITEMS[2:]), shift, 1.0, [(lessons[1], ITEMS[2:])])
    assert divergence < 0.1


def test_the_same_seed_trains_the_same_control():
    """Drawing of items and of strengths included."""
    told: list[tuple[int, int]] = []

    def trained(progress=lambda *_: None) -> list[float]:
        lesson = Lesson("imitate", ITEMS, 2)
        return train_control(Template(model(0), PAD), model(1), [lesson], ControlSettings(steps=3), progress)

    assert trained() == trained(lambda *steps: told.append(steps))
    assert told == [(1, 3), (2, 3), (3, 3)]
