"""The bytes of generated text in a control's tokens."""

from __future__ import annotations

import codecs
import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trimtab_mappings.decoding import SPACE_SIGN, reads_as_space
from trimtab_mappings.vocabulary import Vocabulary, backend_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import Model
    from transformers import PreTrainedTokenizerBase

_Step = dict[str, Any]
_WORD = re.compile(r"\s*\S+|\s+")
_SIGNS = (SPACE_SIGN, "Ġ", "_")  # what normalizers write for a space
_BATCH = 4096  # pieces: enough to be fast, few enough to need little memory
_UNDECODABLE = re.compile("([\udc80-\udcff]+)")


class ByteEncoder:
    """Encodes bytes so that the bytes of the tokens, joined, are the bytes that were given.

    That holds whenever the vocabulary can spell every character. What it can't spell becomes the unknown
    token of the tokenizer's model, or nothing if the model has none. No other special token ever comes out,
    and no space before the text that is not in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        """Take a copy of `tokenizer`'s backend; the tokenizer itself stays as it is.

        Raises:
            VocabularyError: the tokenizer is slow, or its tokens do not join to text.
        """
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._backend = _plain_copy(backend_of(tokenizer, vocabulary.name), vocabulary.special)
        self._unknown = [] if vocabulary.unknown is None else [vocabulary.unknown]

    def encode(self, data: bytes) -> tuple[list[int], bytes]:
        """Encode what has been generated so far.

        Returns:
            The token ids, and the bytes of an incomplete UTF-8 sequence at the very end, which wait
            for the rest of it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        text = decoder.decode(data)
        return self._encode_text(text), decoder.getstate()[0]

    def encode_natively(self, data: bytes) -> list[int] | None:
        """The tokenizer's own tokens for `data`, without a character that waits; None if they don't join."""
        text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data)
        if _UNDECODABLE.search(text):
            return None
        ids = self._own_tokens(text)
        return ids if self.join(ids) == text.encode() else None

    def encode_all(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Encode each of `pieces` by itself, in batches, and to its last byte: nothing waits."""
        encoded: list[list[int]] = []
        for start in range(0, len(pieces), _BATCH):
            encoded += self._encode_batch(pieces[start : start + _BATCH])
        return encoded

    def _encode_batch(self, pieces: Sequence[bytes]) -> list[list[int]]:
        texts = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
        plain = ["" if _UNDECODABLE.search(text) else text for text in texts]
        encodings = self._backend.encode_batch_fast(plain, add_special_tokens=False)
        natively = (encoding.ids for encoding in encodings)
        return [
            ids if self.join(ids) == piece else self._encode_text(text)
            for piece, text, ids in zip(pieces, texts, natively, strict=True)
        ]

    def _encode_text(self, text: str) -> list[int]:
        """Encode `text`, in which bytes that are not UTF-8 stand as surrogates."""
        ids: list[int] = []
        for run in _UNDECODABLE.split(text):
            if _UNDECODABLE.match(run):
                ids += [i for byte in _bytes(run) for i in self._token_or_unknown(bytes([byte]))]
            elif run:
                ids += self._encode_run(run)
        return ids

    def _encode_run(self, text: str) -> list[int]:
        ids = self._own_tokens(text)
        if self.join(ids) == text.encode():
            return ids
        return [token_id for word in _WORD.findall(text) for token_id in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        ids = self._own_tokens(word)
        data = word.encode()
        return ids if self.join(ids) == data else self._spell(data)

    def _own_tokens(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of these tokens."""
        tokens = self.vocabulary.tokens
        return b"".join([tokens[i] for i in ids])

    def _spell(self, data: bytes) -> list[int]:
        """Spell `data` from left to right, each time with the longest token that fits."""
        return [token_id for token in self._longest(data) for token_id in self._token_or_unknown(token)]

    def _longest(self, data: bytes) -> Iterator[bytes]:
        known = self.vocabulary.ids
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest_token), start, -1)
            end = next((end for end in ends if data[start:end] in known), _next_character(data, start))
            yield data[start:end]
            start = end

    def _token_or_unknown(self, token: bytes) -> list[int]:
        token_id = self.vocabulary.ids.get(token)
        return self._unknown if token_id is None else [token_id]

    @cached_property
    def cuts_words(self) -> bool:
        """Whether the tokenizer cuts a text into words by rules of its own before it looks for tokens."""
        cutter = self._backend.pre_tokenizer
        step: _Step = json.loads(cutter.__getstate__()) if cutter else {"type": "Metaspace", "split": False}
        return step["type"] != "Metaspace" or bool(step["split"])

    @cached_property
    def scores_words(self) -> bool:
        """Whether it chooses the tokens of a whole word by their scores, as Unigram does."""
        return type(self._backend.model).__name__ == "Unigram"

    @cached_property
    def pairs(self) -> frozenset[bytes]:
        """Every two bytes that stand next to each other in some token."""
        tokens = self.vocabulary.ids
        return frozenset(token[i : i + 2] for token in tokens for i in range(len(token) - 1))

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.vocabulary.ids), default=0)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _next_character(data: bytes, start: int) -> int:
    end = start + 1
    while end < len(data) and data[end] & 0xC0 == 0x80:  # a continuation byte
        end += 1
    return end


def _plain_copy(backend: Tokenizer, special: Collection[int]) -> Tokenizer:
    """Copy `backend` without the steps that add, drop or change bytes of the text, or find special tokens.

    Its tokens are shared.
    """
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - only where it is used

    signs = [sign for sign in _SIGNS if reads_as_space(backend, sign)]
    normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
    state: dict[str, Any] = {
        **dict.fromkeys(("post_processor", "decoder", "truncation", "padding")),
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer and _plain_normalizer(normalizer, signs),
        "pre_tokenizer": pre_tokenizer and _plain_pre_tokenizer(pre_tokenizer),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    copy = Backend.from_str(json.dumps(state))
    copy.model = _without_dropout(backend.model)
    added = sorted(backend.get_added_tokens_decoder().items())
    copy.add_tokens([_plain_added(token, special=i in special) for i, token in added])
    copy.encode_special_tokens = True
    return copy


def _state(step: Any) -> _Step | None:
    return json.loads(step.__getstate__()) if step else None


def _without_dropout(model: Model) -> Model:
    if getattr(model, "dropout", None) is None:
        return model
    copy: Any = type(model)()
    copy.__setstate__(model.__getstate__())
    copy.dropout = None
    plain: Model = copy
    return plain


def _plain_added(token: AddedToken, *, special: bool) -> AddedToken:
    """An added token that does not swallow the spaces beside it."""
    from tokenizers import AddedToken  # noqa: PLC0415 - only where it is used

    return AddedToken(
        token.content,
        single_word=token.single_word,
        normalized=token.normalized,
        special=special or token.special,
    )


def _plain_normalizer(step: _Step, signs: Sequence[str]) -> _Step | None:
    """Keep what spells the same text another way: ` ` as one of `signs`, bytes as characters."""
    match step:
        case {"type": "Sequence", "normalizers": steps}:
            kept = [plain for each in steps if (plain := _plain_normalizer(each, signs))]
            return {"type": "Sequence", "normalizers": kept} if kept else None
        case {"type": "ByteLevel"}:
            return step
        case {"type": "Replace", "pattern": {"String": " "}, "content": sign} if sign in signs:
            return step
        case {"type": "Replace", "pattern": {"Regex": pattern}, "content": sign} if sign in signs:
            # Without what else the expression matches: a tab, or several spaces as one
            spelled = _replaced(pattern, sign, " ") == sign
            return {**step, "pattern": {"String": " "}} if spelled else None
        case _:
            return None


def _replaced(pattern: str, content: str, text: str) -> str:
    from tokenizers import Regex, normalizers  # noqa: PLC0415 - only where it is used

    return str(normalizers.Replace(Regex(pattern), content).normalize_str(text))


def _plain_pre_tokenizer(step: _Step) -> _Step:
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            signed = any(SPACE_SIGN in str(each) for each in steps)  # then spaces must reach that step
            kept = [each for each in steps if not (signed and each["type"] == "WhitespaceSplit")]
            return {**step, "pretokenizers": [_plain_pre_tokenizer(each) for each in kept]}
        case {"type": "Metaspace"}:
            return {**step, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**step, "add_prefix_space": False}
        case _:
            return step
