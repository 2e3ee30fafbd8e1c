"""What each token of a tokenizer stands for, in bytes: the rules of its decoder, one token at a time."""

from __future__ import annotations

import json
import re
from itertools import islice, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tokenizers import Tokenizer

    _Reader = Callable[[str], bytes]

SPACE_SIGN = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_SPELLINGS = [
    (bytes([16 * high + low]), f"<0x{first}{second}>")
    for high, low in product(range(16), repeat=2)
    for first in {f"{high:x}", f"{high:X}"}
    for second in {f"{low:x}", f"{low:X}"}
]
# Fuse joins the tokens, and Strip then cuts off the dummy prefix
_WITHOUT_REPLACEMENT = {"ByteFallback", "Fuse", "Strip"}
_SAMPLES = 16  # runs of tokens that are held against the tokenizer's own decoder
_RUN = 16
SPACE_SIGNS = {"Ġ": "ByteLevel", SPACE_SIGN: "Metaspace"}
_FEW, _FEW_SHARE = 16, 0.1  # Ġ is a letter too: some tokens may begin with it


class VocabularyError(ValueError):
    """A tokenizer that can't be read as bytes; the message names it and the reason."""


def read_tokens(backend: Tokenizer, name: str) -> list[bytes]:
    """Read the bytes of every token as they stand in the middle of a text.

    Args:
        backend: a tokenizer whose decoder is byte-level, Metaspace, WordPiece, or replaces `▁`, with or
            without byte fallback.
        name: for messages.

    Returns:
        The bytes by token id; b"" for ids that no token has. An added token stands for what it is matched
        against.

    Raises:
        VocabularyError: the decoder is of another kind, or what it writes is not its tokens' bytes joined, or
            it is the decoder of another kind of vocabulary.
    """
    read = _reader(_steps(backend), name)
    model = {i: read(spelling) for spelling, i in backend.get_vocab(with_added_tokens=False).items()}
    words = type(backend.decoder).__name__ == "WordPiece"  # which are joined by spaces, added ones too
    contents = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    added = {i: read(content) if words else content.encode() for i, content in contents.items()}
    found = added | model
    tokens = [found.get(token_id, b"") for token_id in range(1 + max(found, default=-1))]
    _require_no_signs(tokens, name)
    _compare_with_decoder(backend, tokens, sorted(model.keys() - added.keys()), name)
    return tokens


def byte_tokens(backend: Tokenizer, tokens: Sequence[bytes]) -> frozenset[int]:
    """The ids of `<0x00>` to `<0xFF>`, where they stand for bytes."""
    spelled = ((byte, backend.token_to_id(spelling)) for byte, spelling in _BYTE_SPELLINGS)
    return frozenset(i for byte, i in spelled if i is not None and tokens[i] == byte)


def reads_as_space(backend: Tokenizer, sign: str) -> bool:
    """Whether the decoder reads `sign` in a token as a space."""
    return _reader(_steps(backend), "")(sign) == b" "


def _steps(backend: Tokenizer) -> list[dict[str, Any]]:
    """The steps of the decoder, as their descriptions in `tokenizer.json`."""
    if backend.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _reader(steps: Sequence[dict[str, Any]], name: str) -> _Reader:
    """How the spelling of one token becomes bytes."""
    if not steps:
        raise VocabularyError(f"{name}: it has no decoder that says what its tokens stand for")
    replaced: dict[str, str] = {}
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                return _read_byte_level
            case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
                return _word_piece_reader(prefix, cleanup)
            case {"type": "Metaspace", "replacement": sign}:
                replaced[sign] = " "
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                replaced[pattern] = content
            case {"type": kind} if kind not in _WITHOUT_REPLACEMENT:
                raise VocabularyError(f"{name}: tokens can't be read as bytes through its decoder's {kind}")
    return _replacing_reader(replaced, fallback=any(step["type"] == "ByteFallback" for step in steps))


def _replacing_reader(replaced: Mapping[str, str], *, fallback: bool) -> _Reader:
    """As SentencePiece spells: a sign for a space, and with fallback `<0xE4>` for a byte."""

    def read(spelling: str) -> bytes:
        if fallback and (byte := _BYTE_TOKEN.fullmatch(spelling)):
            return bytes.fromhex(byte[1])
        for pattern, content in replaced.items():
            spelling = spelling.replace(pattern, content)
        return spelling.encode()

    return read


def _word_piece_reader(prefix: str, cleanup: bool) -> _Reader:
    """Words are joined by spaces, but for what continues a word, and some punctuation."""
    from tokenizers import decoders  # noqa: PLC0415 - only where it is used

    decode = decoders.WordPiece(prefix, cleanup).decode
    return lambda spelling: decode(["", spelling]).encode()


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's way to spell bytes: printable ones as themselves, the others from U+0100 on, in their order.

    The value is the character with the byte's number; what can't stand in a spelling gets one past all bytes.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = dict.fromkeys(others, "\u0100")
    return alphabet | {0x100 + i: chr(byte) for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _read_byte_level(spelling: str) -> bytes:
    try:
        return spelling.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # as the decoder itself: not in the alphabet, so it is plain text
        return spelling.encode()


def _require_no_signs(tokens: Sequence[bytes], name: str) -> None:
    """Refuse tokens that keep the sign for a space: their decoder is for another kind of vocabulary."""
    for sign, decoder in SPACE_SIGNS.items():
        start = sign.encode()
        signed = [token for token in tokens if token.startswith(start) and token != start]
        if len(signed) > max(_FEW, len(tokens) * _FEW_SHARE):
            example = signed[0].decode(errors="replace")
            raise VocabularyError(
                f"{name}: {len(signed)} tokens begin with {sign!r}, such as {example!r}, which its decoder"
                f" does not read as a space: expected a decoder of type {decoder}. Load the tokenizer with"
                " PreTrainedTokenizerFast, which keeps the decoder of tokenizer.json"
            )


def _compare_with_decoder(backend: Tokenizer, tokens: Sequence[bytes], ids: Sequence[int], name: str) -> None:
    """Hold what was read against what the tokenizer itself writes, on a sample of its tokens.

    Behind another token: at the start of a text decoders drop a space, or keep a `##`.
    """
    start_ids = [*islice(_plain(tokens, ids), 1)]
    start = backend.decode(start_ids)
    for first in range(0, len(ids), max(_RUN, len(ids) // _SAMPLES)):
        run = [*islice(_plain(tokens, ids[first:]), _RUN)]
        ours = b"".join(tokens[i] for i in run).decode()
        theirs = backend.decode([*start_ids, *run]).removeprefix(start)
        if theirs != ours:
            raise VocabularyError(f"{name}: tokens {run} join to {ours!r}, but its decoder writes {theirs!r}")


def _plain(tokens: Sequence[bytes], ids: Sequence[int]) -> Iterator[int]:
    return (i for i in ids if _is_text(tokens[i]))


def _is_text(token: bytes) -> bool:
    try:
        return token.decode().isprintable()
    except UnicodeDecodeError:
        return False
