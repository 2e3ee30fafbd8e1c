"""Checkpoints like the published ones (wuqiong1/deltamodel-15M, -42M, -110M) are controls as they are.

The weights are random. Names, shapes and files are the published ones: a configuration of transformers 4.37,
tied embeddings, bfloat16 safetensors, and 32,000 SentencePiece tokens in `tokenizer.model`. There is no
`tokenizer.json` and no manifest.
"""

from __future__ import annotations

import json
import string
from itertools import islice, product

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from trimtab_mappings import load_encoder
from trimtab_processors.control import Target
from trimtab_processors.pack import Component, Pack, load_pack
from trimtab_processors.parameters import Parameters
from trimtab_processors.runtime import Runtime

TIE_WEIGHTS = PreTrainedModel.tie_weights
"""As it is when the tests are collected."""
VOCABULARY = 32_000
SIZES = {
    "deltamodel-15M": {"hidden_size": 288, "layers": 6, "heads": 6, "ffn": 768, "positions": 256},
    "deltamodel-42M": {"hidden_size": 512, "layers": 8, "heads": 8, "ffn": 1376, "positions": 1024},
    "deltamodel-110M": {"hidden_size": 768, "layers": 12, "heads": 12, "ffn": 2048, "positions": 1024},
}
WEIGHTS = {"deltamodel-15M": 15.2e6, "deltamodel-42M": 41.7e6, "deltamodel-110M": 109.5e6}
TEXT = "we met in a town by the sea"


def config(name: str) -> dict:
    size = SIZES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": size["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": size["ffn"],
        "max_position_embeddings": size["positions"],
        "model_type": "llama",
        "num_attention_heads": size["heads"],
        "num_hidden_layers": size["layers"],
        "num_key_value_heads": size["heads"],
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def write_tokenizer(directory):
    """Llama's kind of vocabulary: specials, 256 bytes, then pieces, the earliest merged first."""
    made = sentencepiece.ModelProto()
    kinds = sentencepiece.ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        made.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        made.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    letters = ["▁", *string.ascii_lowercase]
    longer = ("".join(p) for n in (2, 3, 4) for p in product(letters, *[string.ascii_lowercase] * (n - 1)))
    for rank, piece in enumerate(islice(longer, VOCABULARY - 259 - len(letters))):
        made.pieces.add(piece=piece, score=-rank, type=kinds.NORMAL)
    for rank, piece in enumerate(letters):
        made.pieces.add(piece=piece, score=-VOCABULARY - rank, type=kinds.NORMAL)
    made.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
    made.trainer_spec.byte_fallback = True
    made.trainer_spec.vocab_size = VOCABULARY
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.remove_extra_whitespaces = False
    (directory / "tokenizer.model").write_bytes(made.SerializeToString())
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    write_json(directory / "special_tokens_map.json", roles)
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    specials = [{"content": token, "special": True} | plain for token in ("<unk>", "<s>", "</s>")]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token): special for token, special in enumerate(specials)},
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(directory / "tokenizer_config.json", roles | settings)


@pytest.fixture(scope="module", autouse=True)
def tying():
    """Let models tie their weights. transformers switches that off while it loads one, for the whole process,
    and two loads at once, in any test before, may leave it off.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "tie_weights", TIE_WEIGHTS)
        yield


@pytest.fixture(scope="module", params=SIZES)
def published(request, tmp_path_factory, tying):
    """A directory with the published files of one delta."""
    directory = tmp_path_factory.mktemp("published") / request.param
    directory.mkdir()
    write_json(directory / "config.json", config(request.param))
    write_tokenizer(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config(request.param))).to(torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(
        WEIGHTS[request.param], rel=1e-2
    )
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("routing", ["path", "pm-mined"])
def test_a_published_delta_is_a_control_as_it_is(published, tmp_path, routing):
    """Its logits times the strength are added to those of a target of its vocabulary.

    That is the paper's log-softmax of the target plus the delta: they differ by a constant, which softmax
    removes.
    """
    assert load_pack(str(published)) == Pack(components=(Component(model=str(published)),))
    target = Target("llama", load_encoder(str(published)), VOCABULARY, torch.device("cpu"))
    runtime = Runtime(target, {"alpaca": str(published)}, tables=tmp_path / "tables", cache_bytes=1)
    tokenizer = AutoTokenizer.from_pretrained(published)
    prompt, output = tokenizer(TEXT).input_ids, [400, 31_000]
    assert (prompt[0], tokenizer.decode(prompt[1:])) == (tokenizer.bos_token_id, TEXT)
    request = runtime.open(Parameters(control="alpaca", strength=0.7, routing=routing), prompt, output)
    runtime.step([request])
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    controlled = logits.clone()
    runtime.apply(controlled, {0: [request]})
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).eval()
    with torch.no_grad():
        delta = model(input_ids=torch.tensor([[*prompt, *output]])).logits[:, -1]
    assert delta.std() > 0.1
    torch.testing.assert_close(controlled - logits, 0.7 * delta, atol=1e-4, rtol=1e-4)
    paper = (logits.log_softmax(dim=-1) + 0.7 * delta).softmax(dim=-1)
    torch.testing.assert_close(controlled.softmax(dim=-1), paper, atol=1e-6, rtol=1e-3)
