"""Vocabularies and tables written down by hand, to check what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_mappings import ByteEncoder, read_vocabulary


def encoder(tokens: Sequence[str], merges: Sequence[tuple[str, str]] = (), name: str = "") -> ByteEncoder:
    """A byte-level BPE of these tokens, in GPT-2's spelling; `</s>`, where it is one of them, is the eos."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    roles = {"eos_token": "</s>"} if "</s>" in tokens else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    return ByteEncoder(tokenizer, read_vocabulary(tokenizer, name))


def target() -> ByteEncoder:
    """Has `Sure` and `tea` whole; `q` and `中`'s first bytes are nothing that the control knows."""
    letters = [*"Surteaq", "ä", "å"]
    merges = [("S", "u"), ("r", "e"), ("Su", "re"), ("t", "e"), ("te", "a")]
    return encoder([*letters, "Su", "re", "Sure", "te", "tea", "</s>"], merges, "the-target")


def letters() -> ByteEncoder:
    """Spells everything in letters."""
    return encoder([*"Sureyo", "m", "</s>"], name="the-letters")


def words() -> ByteEncoder:
    """Has `Sure` and `Sorry` whole, and what they are merged from."""
    merges = [
        ("S", "u"),
        ("r", "e"),
        ("Su", "re"),
        ("S", "o"),
        ("r", "y"),
        ("r", "ry"),
        ("So", "rry"),
        ("m", "e"),
    ]
    return encoder([*"Sureyo", "m", *map("".join, merges), "</s>"], merges, "the-words")


def control() -> ByteEncoder:
    """Spells `Sure` as `S`, `ure` and `tea` as `te`, `a`; knows `team` too, and no `re`."""
    merges = [("u", "r"), ("ur", "e"), ("t", "e")]
    return encoder(["</s>", *"Suretam", "ur", "ure", "te", "Sur", "teams"], merges, "the-control")
