"""A tokenizer read as bytes: what each token stands for, whatever way its vocabulary spells it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ROLES = ("bos", "eos", "unk", "pad", "end_of_turn")
SPACE_SIGN = "▁"
_FALLBACK_SPELLING = re.compile(r"<0x([0-9A-F]{2})>")


class VocabularyError(ValueError):
    """A tokenizer that can't be read as bytes; the message names it and the reason."""


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
    """sha256, in hex, of what a table depends on: token bytes, special ids, roles, fallback ids."""
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
    index: dict[bytes, int] = {}
    for fallback in (False, True):
        for token_id, token in enumerate(tokens):
            if token and (token_id in byte_fallback) is fallback:
                index.setdefault(token, token_id)
    return index


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer in a directory or of a hub id; code that comes with it is never run.

    Raises:
        VocabularyError: there is no tokenizer, or only a slow one.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy: only where it is used

    try:
        # beside a tekken.json transformers would choose Mistral's own tokenizer, which is no fast one
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, mistral_format=False)
    except (OSError, ValueError) as error:
        raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {error}") from error
    backend_of(tokenizer, path_or_id)
    return tokenizer


def load_vocabulary(path_or_id: str) -> Vocabulary:
    """Read the vocabulary in a directory or of a hub id, with the generation config's end-of-sequence tokens.

    Raises:
        VocabularyError: the tokenizer can't be loaded, or not be read as bytes.
    """
    return read_vocabulary(load_tokenizer(path_or_id), path_or_id, _generation_eos(path_or_id))


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, name: str = "", eos_ids: Iterable[int] = ()
) -> Vocabulary:
    """Read a fast tokenizer as bytes.

    Args:
        tokenizer: byte-level BPE, or BPE or Unigram that spells a space `▁`, with or without byte fallback.
        name: for messages; by default the tokenizer's own.
        eos_ids: all tokens that end a generation, as the generation config lists them; one that is no
            added token of the tokenizer is text like any other.

    Raises:
        VocabularyError: the tokenizer is slow, or of a kind whose tokens do not join to text.
    """
    name = name or str(tokenizer.name_or_path) or type(tokenizer).__name__
    backend = backend_of(tokenizer, name)
    added = tokenizer.added_tokens_decoder
    roles = _roles(tokenizer, [i for i in eos_ids if i in added])
    special = frozenset(
        {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ).union(*roles.values())
    tokens = _token_bytes(tokenizer, backend, special)
    fallback = _byte_fallback(backend, tokens)
    return Vocabulary(
        name=name,
        tokens=tokens,
        special=special,
        roles=roles,
        dummy_prefix=_has_dummy_prefix(backend, tokens),
        fingerprint=_fingerprint(tokens, special, roles, fallback),
        byte_fallback=fallback,
    )


def backend_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    """The `tokenizers.Tokenizer` behind a fast tokenizer.

    Raises:
        VocabularyError: the tokenizer is slow, or its tokens are words without the spaces between them.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(
            f"{name}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json): convert it first"
        )
    kind = type(backend.model).__name__
    if kind == "WordPiece":
        raise VocabularyError(
            f"{name}: the tokens of a {kind} vocabulary do not join to the text they stand for"
        )
    return backend


def _generation_eos(path_or_id: str) -> tuple[int, ...]:
    from transformers import GenerationConfig  # noqa: PLC0415 - heavy: only where it is used

    try:
        eos = GenerationConfig.from_pretrained(path_or_id).eos_token_id
    except OSError:  # a model need not come with a generation config
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos or ())


def _roles(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> dict[str, tuple[int, ...]]:
    named = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    roles = {role: (token_id,) for role, token_id in named.items() if token_id is not None}
    end_of_turn = tuple(sorted({*eos_ids} - {named["eos"]}))
    return roles | ({"end_of_turn": end_of_turn} if end_of_turn else {})


def _token_bytes(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, special: Collection[int]
) -> tuple[bytes, ...]:
    from xgrammar import TokenizerInfo  # noqa: PLC0415 - heavy: only where it is used

    # any stop token will do: only the vocabulary is read
    info = TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[0])
    tokens: list[bytes] = list(info.decoded_vocab)
    if info.vocab_type.name == "RAW" and _spells_space_with_sign(backend):
        tokens = [token.replace(SPACE_SIGN.encode(), b" ") for token in tokens]
    model_ids = {*backend.get_vocab(with_added_tokens=False).values()}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token_id not in model_ids:  # an added token stands for what it is matched against
            tokens[token_id] = token.content.encode()
    return tuple(b"" if token_id in special else token for token_id, token in enumerate(tokens))


def _spells_space_with_sign(backend: Tokenizer) -> bool:
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return any(SPACE_SIGN.encode() in part.__getstate__() for part in parts if part is not None)


def _byte_fallback(backend: Tokenizer, tokens: Sequence[bytes]) -> frozenset[int]:
    spelled = ((_FALLBACK_SPELLING.fullmatch(token), i) for token, i in backend.get_vocab().items())
    return frozenset(i for match, i in spelled if match and tokens[i] == bytes.fromhex(match[1]))


def _has_dummy_prefix(backend: Tokenizer, tokens: Sequence[bytes]) -> bool:
    return b"".join(tokens[i] for i in backend.encode("a", add_special_tokens=False).ids).startswith(b" ")


def _fingerprint(
    tokens: Iterable[bytes],
    special: Iterable[int],
    roles: Mapping[str, tuple[int, ...]],
    byte_fallback: Iterable[int],
) -> str:
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "big") + token)
    rest: dict[str, Any] = {
        "special": sorted(special),
        "roles": {role: list(roles.get(role, ())) for role in ROLES},
        "byte_fallback": sorted(byte_fallback),
    }
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()
