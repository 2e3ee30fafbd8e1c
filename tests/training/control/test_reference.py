"""The logits of a template at the answers."""

from __future__ import annotations

import torch
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

import tiny
from trimtab_training.control.examples import View
from trimtab_training.control.reference import answer_logits

CPU = torch.device("cpu")
VIEWS = [View((1, 2, 3), (2,)), View((5, 6, 7, 8, 9, 4), (1, 3, 5)), View((9, 2), (1,))]


def test_the_rows_of_a_batch_are_those_of_each_view_alone():
    """Padding and neighbours change nothing, and each row is the one before its answer token."""
    for model in (LlamaForCausalLM(tiny.llama(40, width=64)), GPTNeoXForCausalLM(tiny.gpt_neox(40))):
        together = answer_logits(model, VIEWS, 0, CPU)
        alone = [
            model(input_ids=torch.tensor([view.ids])).logits[0, [place - 1 for place in view.positions]]
            for view in VIEWS
        ]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
