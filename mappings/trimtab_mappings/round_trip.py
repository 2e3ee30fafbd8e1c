"""Whether a tokenizer's own tokens for a plain sentence join to that sentence."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from trimtab_mappings.decoding import SPACE_SIGNS, VocabularyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Encoding, Tokenizer

SENTENCE = "the cat sat on the mat"
# The last has a character that few vocabularies have: they spell it in bytes, or it is unknown.
_SENTENCES = (SENTENCE, "hello the cats in a naïve hat", "a cat is 𓃠 there")


def require_round_trip(backend: Tokenizer, tokens: Sequence[bytes], name: str) -> None:
    """Refuse a tokenizer whose own tokens for a sentence do not join to it.

    Some changes are legitimate: another case, characters without their accents, what a normalizer replaces,
    spaces around the text, and the loss of characters that no token spells.

    Args:
        backend: the tokenizer.
        tokens: the bytes of its tokens as its decoder reads them; b"" for special tokens.
        name: for messages.

    Raises:
        VocabularyError: the tokens of a sentence join to characters that are not in it, or two words
            that the tokenizer knows are one word there, though its vocabulary has spaces.
    """
    for sentence in _SENTENCES:
        encoding = encode(backend, sentence)
        if encoding is None or encoding.overflowing:  # it needs an unknown token, or truncates
            continue
        joined = _join(encoding, tokens)
        if _invents(backend, sentence, joined) or _loses_spaces(backend, tokens, encoding, sentence):
            decoder = type(backend.decoder).__name__
            raise VocabularyError(
                f"{name}: it encodes {sentence!r} to tokens that its decoder ({decoder}) joins to {joined!r}:"
                " the rules of this tokenizer do not belong together. Save it again (`save_pretrained`) with"
                " the class that the model was trained with, or correct `decoder` in its tokenizer.json"
            )


def encode(backend: Tokenizer, text: str) -> Encoding | None:
    """Encode a text; None if the model needs an unknown token and has none."""
    try:
        return backend.encode(text, add_special_tokens=False)
    except Exception:  # noqa: BLE001 - the class itself
        return None


def _invents(backend: Tokenizer, sentence: str, joined: str) -> bool:
    """Whether characters came back that neither the sentence has nor a normalizer writes for text."""
    normalized = sentence if backend.normalizer is None else backend.normalizer.normalize_str(sentence)
    written = {*_folded(normalized)} - SPACE_SIGNS.keys()
    return not {*_folded(joined)} <= written | {*_folded(sentence)}


def _loses_spaces(backend: Tokenizer, tokens: Sequence[bytes], encoding: Encoding, sentence: str) -> bool:
    if not _spells_spaces(tokens) or not all(
        tokens[i] for i in encoding.ids
    ):  # an unknown token swallows any
        return False
    if backend.normalizer is None and backend.pre_tokenizer is None:
        return False  # only what no token spells is lost
    known = {word for word in map(_folded, sentence.split()) if _is_known(backend, tokens, word)}
    return not known <= {*_folded(_join(encoding, tokens)).split()}


def _is_known(backend: Tokenizer, tokens: Sequence[bytes], word: str) -> bool:
    encoding = encode(backend, word)
    return encoding is not None and _folded(_join(encoding, tokens)).strip() == word


def _spells_spaces(tokens: Sequence[bytes]) -> bool:
    """Whether some token has a space, or a sign for one that its decoder does not read."""
    signs = (b" ", *(sign.encode() for sign in SPACE_SIGNS))
    return any(sign in token for token in tokens for sign in signs)


def _join(encoding: Encoding, tokens: Sequence[bytes]) -> str:
    """Join the bytes of the tokens, without padding."""
    pairs = zip(encoding.ids, encoding.attention_mask, strict=True)
    return b"".join(tokens[i] for i, is_text in pairs if is_text).decode(errors="ignore")


def _folded(text: str) -> str:
    """Fold case and accents, which normalizers change on purpose."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
