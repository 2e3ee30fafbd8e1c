"""A tokenizer read as bytes: what each token stands for, whatever way its vocabulary spells it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trimtab_mappings.decoding import VocabularyError, byte_tokens, read_tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

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
    """sha256, in hex, of what a table depends on: token bytes, special ids, roles, fallback ids, and
    the rules (merges, scores, words) by which texts become tokens."""
    names: Mapping[int, str] = field(default_factory=dict)
    """How special tokens are written, by their ids; for people."""
    byte_fallback: frozenset[int] = frozenset()
    """Tokens `<0x00>` to `<0xFF>` of a vocabulary that has them beside its tokens of text."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The one token that a tokenizer would choose for these bytes: see `index_tokens`."""
        return index_tokens(self.tokens, self.byte_fallback)


def index_tokens(tokens: Sequence[bytes], byte_fallback: Collection[int] = ()) -> dict[bytes, int]:
    """Token ids by bytes.

    Of several tokens with the same bytes the lowest id is taken, but a token of text before a byte token:
    a tokenizer resorts to those only where it has no other.
    """
    text = {token: i for i, token in reversed([*enumerate(tokens)]) if token and i not in byte_fallback}
    return {tokens[i]: i for i in sorted(byte_fallback, reverse=True)} | text


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
        VocabularyError: the tokenizer is slow, or of a kind whose tokens do not join to text.
    """
    name = name or str(tokenizer.name_or_path) or type(tokenizer).__name__
    backend = backend_of(tokenizer, name)
    added = tokenizer.added_tokens_decoder
    ends = {*eos_ids, *_template_end(tokenizer)} & added.keys()
    roles = _roles(tokenizer, ends)
    special = frozenset(
        {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ).union(*roles.values())
    spelled = read_tokens(backend, name)
    tokens = tuple(b"" if token_id in special else token for token_id, token in enumerate(spelled))
    fallback = byte_tokens(backend, tokens)
    return Vocabulary(
        name=name,
        tokens=tokens,
        special=special,
        roles=roles,
        dummy_prefix=_has_dummy_prefix(backend, tokens),
        fingerprint=_fingerprint(backend, tokens, special, roles, fallback),
        byte_fallback=fallback,
        names={i: str(backend.id_to_token(i)) for i in sorted(special)},
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


def _roles(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> dict[str, tuple[int, ...]]:
    named = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    roles = {role: (token_id,) for role, token_id in named.items() if token_id is not None}
    end_of_turn = tuple(sorted({*ends} - {named["eos"]}))
    return roles | ({"end_of_turn": end_of_turn} if end_of_turn else {})


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the chat template writes behind an answer."""
    if not tokenizer.chat_template:
        return []
    question, answer = "What is it?", "An answer."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - it asks for more than two messages, or is broken in any other way
        return []
    _, written, behind = text.rpartition(answer)
    return tokenizer.encode(behind.lstrip(), add_special_tokens=False)[:1] if written else []


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
    backend: Tokenizer,
    tokens: Iterable[bytes],
    special: Iterable[int],
    roles: Mapping[str, tuple[int, ...]],
    byte_fallback: Iterable[int],
) -> str:
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in tokens))
    rest: dict[str, Any] = {
        "special": sorted(special),
        "roles": {role: list(roles.get(role, ())) for role in ROLES},
        "byte_fallback": sorted(byte_fallback),
    }
    for part in (json.dumps(rest).encode(), *_encoding_rules(backend)):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.hexdigest()


__all__ = [
    "ROLES",
    "Vocabulary",
    "VocabularyError",
    "backend_of",
    "index_tokens",
    "read_vocabulary",
    "role_warning",
]
