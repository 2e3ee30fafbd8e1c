"""A tokenizer read as bytes: what each token stands for, whatever way its vocabulary spells it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trimtab_mappings.decoding import VocabularyError, byte_tokens, read_tokens
from trimtab_mappings.round_trip import require_round_trip
from trimtab_mappings.special_tokens import find_special_tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from trimtab_mappings.special_tokens import SpecialTokens

ROLES = ("bos", "eos", "unk", "pad", "end_of_turn")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes and the special tokens of one tokenizer, by token id."""

    name: str
    """Where it was read from; for messages."""
    tokens: tuple[bytes, ...]
    """The bytes of each token; b"" for special tokens and unused ids."""
    special: frozenset[int]
    """Ids that stand for no text."""
    roles: Mapping[str, tuple[int, ...]]
    """Which special tokens play which of `ROLES`; `end_of_turn`: further tokens that end a generation."""
    dummy_prefix: bool
    """Whether encoding `a` yields the bytes ` a`, as SentencePiece does."""
    fingerprint: str
    """sha256, in hex, of what a table depends on: token bytes, special tokens, roles, fallback ids, and
    the rules (merges, scores, words, added tokens) by which texts become tokens."""
    names: Mapping[int, str] = field(default_factory=dict)
    """How special tokens are written, by their ids; for people."""
    byte_fallback: frozenset[int] = frozenset()
    """Tokens `<0x00>` to `<0xFF>` of a vocabulary that has them beside its tokens of text."""
    turn_end: int | None = None
    """The special token that the chat template writes behind an answer; it may be eos."""
    unknown: int | None = None
    """The special token that the model says for what it can't spell."""
    said: frozenset[int] = frozenset()
    """Of tokens of text with the same bytes, those that the tokenizer says for these bytes."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The one token that a tokenizer would choose for these bytes: see `index_tokens`."""
        return index_tokens(self.tokens, self.byte_fallback, self.said)


def index_tokens(
    tokens: Sequence[bytes], byte_fallback: Collection[int] = (), said: Collection[int] = ()
) -> dict[bytes, int]:
    """Token ids by bytes.

    Of several tokens with the same bytes the one that the tokenizer says is taken, else a token of text
    before a byte token (a tokenizer resorts to those only where it has no other), else the lowest id.
    """
    text = {token: i for i, token in reversed([*enumerate(tokens)]) if token and i not in byte_fallback}
    bytes_ = {tokens[i]: i for i in sorted(byte_fallback, reverse=True)}
    return bytes_ | text | {tokens[i]: i for i in sorted(said, reverse=True)}


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, name: str = "", eos_ids: Iterable[int] = ()
) -> Vocabulary:
    """Read a fast tokenizer as bytes.

    The bytes of a text's tokens, joined, are the text that the tokenizer's own decoder writes: the text
    itself, but for what the tokenizer loses (case, repeated spaces, the space before punctuation in
    WordPiece) and for a dummy space before it.

    Args:
        tokenizer: byte-level BPE; BPE or Unigram that spells a space `▁`, with or without byte fallback;
            WordPiece.
        name: for messages; by default the tokenizer's own.
        eos_ids: all tokens that end a generation, as the generation config lists them; one that is no
            added token of the tokenizer is text like any other. What ends a turn in the tokenizer's chat
            template is found without being listed.

    Raises:
        VocabularyError: the tokenizer is slow, or of a kind whose tokens do not join to text, or the tokens
            of a plain sentence do not join to it.
    """
    name = name or str(tokenizer.name_or_path) or type(tokenizer).__name__
    backend = backend_of(tokenizer, name)
    special = find_special_tokens(tokenizer, backend, eos_ids)
    spelled = read_tokens(backend, name)
    tokens = tuple(b"" if token_id in special.ids else token for token_id, token in enumerate(spelled))
    require_round_trip(backend, tokens, name)
    fallback = byte_tokens(backend, tokens)
    return Vocabulary(
        name=name,
        tokens=tokens,
        special=special.ids,
        roles=special.roles,
        dummy_prefix=_has_dummy_prefix(backend, tokens),
        fingerprint=_fingerprint(backend, tokens, special, fallback),
        byte_fallback=fallback,
        names=_names(backend, special.ids),
        turn_end=special.turn_end,
        unknown=special.unknown,
        said=_said(backend, tokens, fallback),
    )


def role_warning(vocabulary: Vocabulary, side: str) -> str | None:
    """What a side of a mapping can't do for want of special tokens with a role; None if it has an eos.

    Args:
        vocabulary: the side's.
        side: what it is in the mapping, `target` or `control`; for the message.
    """
    if "eos" in vocabulary.roles:
        return None
    roles = ", ".join(vocabulary.roles)
    lack = f"no eos token (of the roles it has: {roles})" if roles else "no special token with a role"
    return (
        f"the {side} {vocabulary.name!r} has {lack}, so that a control has no say in where an answer ends;"
        " name the tokens in its tokenizer_config.json"
    )


def backend_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    """The `tokenizers.Tokenizer` behind a fast tokenizer.

    Raises:
        VocabularyError: the tokenizer is slow.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(
            f"{name}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json): convert it first"
        )
    return backend


def _said(backend: Tokenizer, tokens: Sequence[bytes], byte_fallback: Collection[int]) -> frozenset[int]:
    """Of tokens of text with the same bytes, those that the tokenizer says for these bytes."""
    text = [token for token_id, token in enumerate(tokens) if token and token_id not in byte_fallback]
    doubled = [token for token, count in Counter(text).items() if count > 1]
    texts = [token.decode(errors="ignore") for token in doubled]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    pairs = zip(doubled, encodings, strict=True)
    return frozenset(i for token, encoding in pairs for i in encoding.ids if tokens[i] == token)


def _has_dummy_prefix(backend: Tokenizer, tokens: Sequence[bytes]) -> bool:
    return b"".join(tokens[i] for i in backend.encode("a", add_special_tokens=False).ids).startswith(b" ")


def _encoding_rules(backend: Tokenizer) -> list[bytes]:
    """What decides, beside the tokens themselves, which of them a text becomes: merges or scores, words.

    They are as the tokenizer dumps them, unparsed: a large vocabulary has half a million merges.
    """
    steps = (backend.normalizer, backend.pre_tokenizer)
    return [
        _without_vocabulary(backend.model.__getstate__()),
        *(step.__getstate__() for step in steps if step),
    ]


def _without_vocabulary(model: bytes) -> bytes:
    """A model's dump without its tokens, except for Unigram's, which have scores.

    A quote inside a string of JSON has a backslash before it, so that none of this can be part of a token.
    """
    before, is_mapping, rest = model.partition(b'"vocab":{')
    _, has_merges, merges = rest.rpartition(b'},"merges":[')
    return before + (merges if has_merges else b"") if is_mapping else model


def _fingerprint(
    backend: Tokenizer, tokens: Iterable[bytes], special: SpecialTokens, byte_fallback: Iterable[int]
) -> str:
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in tokens))
    rest: dict[str, Any] = {
        "special": _names(backend, special.ids),
        "roles": {role: list(special.roles.get(role, ())) for role in ROLES},
        "turn_end": special.turn_end,
        "unknown": special.unknown,
        "added": _added_text(backend, special.ids),
        "byte_fallback": sorted(byte_fallback),
    }
    for part in (json.dumps(rest).encode(), *_encoding_rules(backend)):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.hexdigest()


def _names(backend: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    return {i: str(backend.id_to_token(i)) for i in sorted(ids)}


def _added_text(backend: Tokenizer, special: Collection[int]) -> list[tuple[int, bool, bool]]:
    """The added tokens of text: the tokenizer cuts a text at them before its model reads it."""
    added = sorted(backend.get_added_tokens_decoder().items())
    return [(i, token.single_word, token.normalized) for i, token in added if i not in special]


__all__ = [
    "ROLES",
    "Vocabulary",
    "VocabularyError",
    "backend_of",
    "index_tokens",
    "read_vocabulary",
    "role_warning",
]
