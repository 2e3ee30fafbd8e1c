"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional
from transformers import LlamaForCausalLM

import tiny
from trimtab_training.control.errors import TrainingError
from trimtab_training.control.examples import Example, View
from trimtab_training.control.objectives import make_objective
from trimtab_training.control.recipe import DataSet
from trimtab_training.control.reference import LiveTemplate, answer_logits
from trimtab_training.control.trainer import Step, Trainer, TrainingSet, checkpoints

VOCAB, PAD, CPU = 40, 0, torch.device("cpu")
EXAMPLES = [Example(View((1, 2, i, 3 + i, 4), (3, 4))) for i in range(5, 9)]
OTHERS = [Example(View((7, i, 9, i + 1), (1, 2, 3))) for i in range(5, 9)]


def model(seed: int, *, vocab: int = VOCAB, width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny.llama(vocab, width=width, layers=1))


def training_set(
    examples: Sequence[Example], name: str = "a", *, weight: float = 1.0, size: int = 2, **keys: object
):
    given = DataSet.model_validate({"path": name, "format": "text"} | keys)
    return TrainingSet(name, examples, make_objective(given), weight, size)


@pytest.fixture
def make_trainer(make_recipe):
    def make(
        template: LlamaForCausalLM, control: LlamaForCausalLM, sets: Sequence[TrainingSet], **keys: object
    ):
        recipe = make_recipe(**keys)
        AcceleratorState._reset_state()  # else it keeps the precision of the first
        accelerator = Accelerator(
            cpu=True, mixed_precision=recipe.mixed_precision, step_scheduler_with_optimizer=False
        )
        reference = LiveTemplate(template, PAD, CPU, VOCAB)
        return Trainer(accelerator, control, reference, sets, recipe, pad_id=PAD, vocabulary=VOCAB)

    return make


def steps_of(trainer: Trainer, count: int | None = None) -> list[Step]:
    steps: list[Step] = []

    def on_step(step: Step) -> bool:
        steps.append(step)
        return len(steps) != count

    trainer.run(on_step)
    return steps


def weights(control: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in control.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_gradients_reach_the_control_only(make_trainer):
    """The template is bit-identical afterwards, and has no gradient."""
    template, control = model(0), model(1)
    before, untrained = weights(template), weights(control)
    steps_of(make_trainer(template, control, [training_set(EXAMPLES)]))
    assert same(before, weights(template))
    assert all(parameter.grad is None for parameter in template.parameters())
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in control.named_parameters())


def test_training_teaches_the_sum(make_trainer):
    """The controlled answers become the likeliest ones."""
    template, control = model(0, width=128), model(1)
    steps = steps_of(make_trainer(template, control, [training_set(EXAMPLES, size=4)], max_steps=100))
    assert steps[0].loss > 2
    assert steps[-1].loss < 0.1
    views = [example.view for example in EXAMPLES]
    summed = LiveTemplate(template, PAD, CPU, VOCAB).log_probs(views) + answer_logits(
        control, views, PAD, CPU
    )
    assert summed.argmax(dim=1).tolist() == [token for view in views for token in view.targets]


def test_one_step_is_the_one_written_by_hand(make_trainer):
    """Two data sets with weights, a strength, a penalty, clipping, AdamW and a warmup: nothing but torch."""
    template, control, by_hand = model(0), model(1), model(1)
    sets = [
        training_set(EXAMPLES, size=4, objective="forget", bound=None, weight=0.5),
        training_set(OTHERS, "b", size=4, objective="retain", weight=2.0),
    ]
    keys = {
        "strength": 0.7,
        "shift_penalty": 0.01,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-2,
    }
    trainer = make_trainer(
        template,
        control,
        sets,
        **keys,
        learning_rate=0.1,
        warmup_steps=2,
        lr_scheduler_type="constant_with_warmup",
    )
    step = steps_of(trainer, 2)[1]

    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.05, weight_decay=0.1, eps=1e-2)
    for rate in (0.0, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        losses, shifts = [], []
        for examples, kind in ((EXAMPLES, "forget"), (OTHERS, "retain")):
            total, count = torch.zeros(()), 0
            for example in examples:
                ids, places = torch.tensor([example.view.ids]), list(example.view.positions)
                before = [place - 1 for place in places]
                shift = by_hand(input_ids=ids).logits[0, before]
                with torch.no_grad():
                    own = template(input_ids=ids).logits[0, before].log_softmax(dim=-1)
                mixed = (own + 0.7 * shift).log_softmax(dim=-1)
                if kind == "forget":
                    total = total + mixed[range(len(places)), example.view.targets].sum()
                else:
                    total = total + functional.kl_div(mixed, own, log_target=True, reduction="sum")
                count += len(places)
                shifts.append(shift)
            losses.append(total / count)
        loss = 0.5 * losses[0] + 2 * losses[1] + 0.01 * torch.cat(shifts).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert step.losses == {
        "a": pytest.approx(losses[0].item(), rel=1e-5),
        "b": pytest.approx(losses[1].item(), rel=1e-5),
    }
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert step.learning_rate == pytest.approx(0.05)
    for name, tensor in control.named_parameters():
        torch.testing.assert_close(tensor, by_hand.get_parameter(name), atol=1e-5, rtol=1e-4, msg=name)


def test_accumulated_gradients_are_those_of_the_larger_batch(make_trainer):
    """Means are over the tokens of the whole step, however long the answers of each part are."""
    examples = [*EXAMPLES[:2], *OTHERS[:1], Example(View((1, 2, 3, 4, 5, 6, 7), (2, 3, 4, 5, 6)))]
    whole, parts = model(1), model(1)
    keys = {"max_steps": 1, "adam_epsilon": 1e-2}
    together = steps_of(make_trainer(model(0), whole, [training_set(examples, size=4)], **keys))
    apart = steps_of(
        make_trainer(model(0), parts, [training_set(examples, size=1)], **keys, gradient_accumulation_steps=4)
    )
    assert apart[0].loss == pytest.approx(together[0].loss, rel=1e-5)
    for name, tensor in whole.named_parameters():
        torch.testing.assert_close(tensor, parts.get_parameter(name), atol=1e-5, rtol=1e-3, msg=name)


def test_an_interrupted_run_equals_one_that_was_not(make_trainer, tmp_path):
    """Bit by bit: weights, losses, rates and strengths; with dropout, so that the random state counts."""

    def run(control: LlamaForCausalLM) -> Trainer:
        sets = [training_set(EXAMPLES, size=3), training_set(OTHERS, "b", objective="retain")]
        return make_trainer(
            model(0), control, sets, strength=[0.5, 1.5], lr_scheduler_type="cosine", warmup_ratio=0.3
        )

    def dropping(seed: int) -> LlamaForCausalLM:
        control = model(seed)
        control.config.attention_dropout = 0.3
        for layer in control.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return control

    straight = dropping(1)
    torch.manual_seed(5)
    expected = steps_of(run(straight))
    torch.manual_seed(5)
    first = run(dropping(1))
    steps = steps_of(first, 4)
    first.save(tmp_path, "same")
    torch.manual_seed(99)
    goes_on = dropping(2)
    second = run(goes_on)
    second.load(tmp_path / "checkpoint-4", "same")
    steps += steps_of(second)
    assert steps == expected
    assert same(weights(straight), weights(goes_on))


def test_a_checkpoint_of_another_run_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(model(0), model(1), [training_set(EXAMPLES)])
    trainer.save(tmp_path, "one")
    with pytest.raises(TrainingError, match="comes from another recipe, other data or another number"):
        trainer.load(tmp_path / "checkpoint-0", "another")
    with pytest.raises(TrainingError, match="is not a whole checkpoint"):
        trainer.load(tmp_path / "checkpoint-7", "one")


def test_old_checkpoints_are_deleted(make_trainer, tmp_path):
    trainer = make_trainer(model(0), model(1), [training_set(EXAMPLES)], save_total_limit=2)
    for done in (2, 4, 10):
        trainer.done = done
        trainer.save(tmp_path, "")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


def test_a_loss_that_is_not_finite_ends_the_training(make_trainer):
    control = model(1)
    with torch.no_grad():
        control.lm_head.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="The loss of step 1 is nan"):
        steps_of(make_trainer(model(0), control, [training_set(EXAMPLES)]))


def test_a_gradient_that_is_not_finite_spoils_no_weight(make_trainer, monkeypatch):
    control, sets = model(2), [training_set(EXAMPLES)]
    trainer = make_trainer(model(1), control, sets, max_steps=3)
    monkeypatch.setattr(trainer._accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    before = weights(control)
    with pytest.raises(TrainingError, match="The gradient of step 1 is not finite"):
        steps_of(trainer)
    assert same(before, weights(control))


def test_master_weights_are_float32_in_mixed_precision(make_trainer):
    """And the loss is that of float32, but for the rounding."""
    exact, mixed = model(1), model(1)
    expected = steps_of(make_trainer(model(0), exact, [training_set(EXAMPLES)], max_steps=3))
    steps = steps_of(make_trainer(model(0), mixed, [training_set(EXAMPLES)], max_steps=3, bf16=True))
    assert {tensor.dtype for tensor in mixed.parameters()} == {torch.float32}
    assert steps[2].loss != expected[2].loss
    assert steps[2].loss == pytest.approx(expected[2].loss, rel=0.02)


def test_logits_past_the_shared_ones_are_left_out(make_trainer):
    """A template that is padded further than its control has the loss of one that is not."""
    padded, cut = model(0, vocab=VOCAB + 8), model(0)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            cut.get_parameter(name).copy_(padded.get_parameter(name)[:VOCAB])
        for name, tensor in cut.model.layers.named_parameters():
            tensor.copy_(padded.model.layers.get_parameter(name))
    losses = [
        steps_of(make_trainer(each, model(1), [training_set(EXAMPLES)], max_steps=1))[0]
        for each in (padded, cut)
    ]
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-6)


def test_distilling_holds_the_sum_to_what_the_template_says_to_another_prompt(make_trainer):
    """The shift learns the difference that the prompt makes."""
    template, control = model(0, width=128), model(1)
    examples = [Example(View((1, i, 9, 8), (2, 3)), View((5, 6, i, 9, 8), (3, 4))) for i in range(3, 7)]
    sets = [training_set(examples, size=4, objective="distill", teacher={"system_prompt": "x"})]
    steps = steps_of(make_trainer(template, control, sets, max_steps=150))
    assert steps[-1].loss < 0.1
    assert steps[0].loss > 0.5
    reference = LiveTemplate(template, PAD, CPU, VOCAB)
    plain = reference.log_probs([example.view for example in examples])
    shift = answer_logits(control, [example.view for example in examples], PAD, CPU)
    taught = reference.log_probs([example.teacher for example in examples])
    moved, left = (
        (given.softmax(dim=1) - taught.exp()).abs().sum(dim=1).max() for given in (plain + shift, plain)
    )
    assert moved < 0.3
    assert left > 0.6
