"""Tables between real vocabularies: Mistral's, and Llama's with the table of the paper's authors."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, build_table, read_vocabulary

V1 = "tokenizer.model.v1"
V3 = "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = "tekken_240718.json"
SENTENCEPIECE = (
    *(V1, "mistral_instruct_tokenizer_240216.model.v2", V3),
    "mistral_instruct_tokenizer_241114.model.v7",
)
ALL = (*SENTENCEPIECE, TEKKEN, "tekken_240911.json")
REAL = (V1, V3, TEKKEN)


@dataclass(frozen=True)
class Reference:
    """The authors' table from Mistral 7B v0.1 to Llama, and Llama's vocabulary as it is spelled."""

    mapping: NDArray[np.int64]
    exact: NDArray[np.bool_]
    llama: list[str]


@pytest.fixture(scope="module", params=ALL)
def by_mistral(request, mistral, mistral_data):
    """How Mistral itself encodes, our reading of the same vocabulary, and what may stand before a text."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    own = MistralTokenizer.from_file(str(mistral_data / request.param)).instruct_tokenizer.tokenizer
    prefix = b" " if request.param in SENTENCEPIECE else b""
    return own, mistral[request.param], prefix


@pytest.fixture(scope="module")
def reference(shared):
    directory = shared / "reference" / "pm_mined"
    if not directory.is_dir():
        pytest.skip(f"the reference table is not at {directory}; TRIMTAB_SHARED says where it is")
    names = ("mistral_v1_to_llama_id", "mistral_v1_to_llama_match", "llama_vocab")
    mapping, exact, vocabulary = (json.loads((directory / f"{name}.json").read_text()) for name in names)
    return Reference(np.array(mapping), np.array(exact, dtype=bool), vocabulary)


@pytest.fixture(scope="module")
def llama(reference):
    """Llama's tokenizer, from its tokens alone: without merges, which the mapping does not need."""
    vocabulary = {token: i for i, token in enumerate(reference.llama)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer, "llama"))


@pytest.fixture(scope="module")
def mistral_to_llama(mistral, llama):
    target = mistral[V1].vocabulary
    return target, build_table(mistral[V1], llama)


@given(text=st.text())
@example(text="▁ ▁")
@example(text="Größe ≠ 大小:\n\n\tdef f(x): return x  # 🙂 </s> [INST]\n<0xE4>")
@example(text=" \0 ")
def test_what_mistral_encodes_joins_to_the_text(by_mistral, text):
    own, encoder, prefix = by_mistral
    ids = own.encode(text, bos=False, eos=False)
    written = text.replace("▁", " ") if prefix else text  # SentencePiece takes its own sign for a space
    assert encoder.join(ids) == (prefix + written.encode() if text else b"")


def test_the_special_tokens_are_mistral_s(by_mistral):
    own, encoder, _ = by_mistral
    theirs = {"bos": own.bos_id, "eos": own.eos_id, "unk": own.unk_id, "pad": own.pad_id}
    assert encoder.vocabulary.roles == {role: (i,) for role, i in theirs.items() if i >= 0}
    assert len(encoder.vocabulary) == own.n_words


def test_the_authors_table_is_reproduced_but_for_one_row(reference, mistral_to_llama):
    target, table = mistral_to_llama
    theirs = reference.mapping
    mapped = theirs >= 0
    assert mapped.sum() == 32_000 - 1_341
    differing = np.flatnonzero(mapped & (table.mapping != theirs))
    # by its spelling the reference takes it for a byte token
    assert [target.tokens[i] for i in differing] == [b"<?>"]


def test_the_authors_exact_rows_are_reproduced_but_for_control_characters(reference, mistral_to_llama, llama):
    target, table = mistral_to_llama
    theirs = reference.exact.copy()
    theirs[list(target.special)] = False
    differing = np.flatnonzero(theirs != table.exact)
    only_theirs = [target.tokens[i] for i in differing if theirs[i]]
    only_ours = {target.tokens[i]: table.mapping[i] for i in differing if table.exact[i]}
    assert only_theirs == [b"<?>"]
    # Llama has them as byte tokens only, which the reference spells `<0x..>`
    assert {len(token) for token in only_ours} == {1}
    assert {*only_ours.values()} <= llama.vocabulary.byte_fallback


def test_the_authors_unmapped_rows_find_a_byte_token_but_for_five(reference, mistral_to_llama, llama):
    target, table = mistral_to_llama
    theirs_unmapped = np.flatnonzero(reference.mapping < 0)
    ours = table.mapping[theirs_unmapped]
    # of these Llama has nothing but the bare space, which stands only for spaces
    unmapped = {target.tokens[i].decode() for i in theirs_unmapped[ours < 0]}
    assert unmapped == {" \u200b", " ©", " ±", " ↘", " م"}
    assert {*ours[ours >= 0].tolist()} <= llama.vocabulary.byte_fallback


@pytest.mark.parametrize("target_name", REAL)
@pytest.mark.parametrize("control_name", REAL)
def test_real_tables_spell_every_token_of_the_target(mistral, target_name, control_name):
    target, control = mistral[target_name].vocabulary, mistral[control_name]
    table = build_table(mistral[target_name], control)
    spelled = [control.join(table.segment(token_id)) for token_id in range(len(target))]
    assert spelled == list(target.tokens)


@pytest.mark.parametrize("name", ALL)
def test_a_real_vocabulary_maps_to_itself(mistral, name):
    control = mistral[name]
    table = build_table(control, control)
    text = np.array([bool(token) for token in control.vocabulary.tokens])
    assert table.exact.tolist() == text.tolist()
    tokens = control.vocabulary.tokens
    assert all(tokens[i] == tokens[j] for i, j in enumerate(table.mapping) if text[i])


def test_what_two_mistral_vocabularies_share_is_exact(mistral):
    coverage = build_table(mistral[V1], mistral[V3]).coverage
    assert coverage == (32_000 - 3, 0, 0, 3, 0)


@pytest.mark.parametrize("name", ALL)
def test_a_real_text_survives_every_real_vocabulary(mistral, name):
    text = "Größe ≠ 大小:\n\n\tdef f(x): return x  # 🙂 ▁ </s> [INST]\n".encode()
    ids, waiting = mistral[name].encode(text + b"\xe2\x82")
    assert mistral[name].join(ids) == text
    assert waiting == b"\xe2\x82"
