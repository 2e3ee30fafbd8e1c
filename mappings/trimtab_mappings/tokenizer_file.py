"""The rules in a `tokenizer.json`, held against those that transformers gave the tokenizer."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab_mappings.decoding import VocabularyError
from trimtab_mappings.round_trip import SENTENCE, encode
from trimtab_mappings.vocabulary import backend_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_STEPS = ("normalizer", "pre_tokenizer", "decoder")
_VOCAB = re.compile(rb'"vocab"\s*:\s*[\[{]')
# Lower case and ASCII: settings such as `do_lower_case` may differ from the file on purpose.
_TEXT = "x the cat didn't sit on 3.14 mats;\n\n\tif (a == b) { return 1234567; }   # done"
_SAMPLES = 16
_RUN = 16


@dataclass(frozen=True)
class _Misreading:
    """A difference between a `tokenizer.json` and the tokenizer that transformers made of it."""

    what: str
    """The difference, for people."""
    file_holds: bool
    """Whether the file's rules write a sentence back as it was."""
    loaded_holds: bool
    """Whether the loaded tokenizer's rules do."""


def follow_file(
    tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the rules of its `tokenizer.json`.

    Some classes of transformers (such as `LlamaTokenizerFast`) take only the tokens of that file, and bring
    a pre-tokenizer and a decoder of their own. If these read or write text in another way than the file, the
    file is right, since the model was trained with it. The class is right if only the class writes a
    sentence back as it was. A warning says which side is wrong.

    Args:
        tokenizer: what transformers loaded.
        name: the directory or the hub id that it was loaded from.
        revision: the revision on the hub.

    Raises:
        VocabularyError: the two differ, and neither writes a sentence back as it was.
    """
    path = _find(name, revision)
    if path is None or (difference := _misreading(backend_of(tokenizer, name), path)) is None:
        return tokenizer
    kind = type(tokenizer).__name__
    told = f"{name}: {kind} of transformers does not follow tokenizer.json: {difference.what}"
    if difference.file_holds:
        _log.warning(
            "%s; the library follows tokenizer.json, but vLLM reads and writes text as %s does. To mend that,"
            ' set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json (transformers ignores'
            " it for some values of model_type in config.json)",
            told,
            kind,
        )
        return _from_file(tokenizer, name, revision)
    if difference.loaded_holds:
        _log.warning("%s; the library follows %s: tokenizer.json loses text", told, kind)
        return tokenizer
    raise VocabularyError(
        f"{told}; neither of them decodes {SENTENCE!r} to what it was. Save the tokenizer anew"
        " (`save_pretrained`) with the class that the model was trained with"
    )


def _find(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only where it is used

    if (directory := Path(name)).is_dir():
        path = directory / "tokenizer.json"
        return path if path.is_file() else None
    cached = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _from_file(
    tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None
) -> PreTrainedTokenizerBase:
    """Load the file by the class that takes it as it is, with the roles that the other class knows."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy: only where it is used

    plain = PreTrainedTokenizerFast.from_pretrained(
        name, revision=revision, local_files_only=True, fix_mistral_regex=False
    )
    known = plain.get_vocab()
    roles = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token in known and getattr(plain, role, None) is None
    }
    plain.add_special_tokens(roles)
    return plain


def _misreading(loaded: Tokenizer, path: Path) -> _Misreading | None:
    rules = _rules(path)
    if rules is None or not _differs(loaded, rules):
        return None
    in_file = _with_rules(loaded, rules, path)
    if not (what := _first_difference(loaded, in_file)):
        return None
    return _Misreading(what, _holds(in_file), _holds(loaded))


def _rules(path: Path) -> dict[str, Any] | None:
    """Everything that stands before the tokens in a `tokenizer.json`; None if the file is of another layout.

    The tokens come last in it, and parsing them takes nearly all of the time.
    """
    data = path.read_bytes()
    start = _VOCAB.search(data)
    if start is None:
        return None
    try:
        rules: dict[str, Any] = json.loads(data[: start.start()].rstrip().rstrip(b",") + b"}}")
    except ValueError:
        rules = json.loads(data)
    return rules if {*_STEPS} <= rules.keys() else json.loads(data)


def _differs(loaded: Tokenizer, rules: dict[str, Any]) -> bool:
    steps = (_state(getattr(loaded, step)) != rules.get(step) for step in _STEPS)
    return _model_differs(loaded, rules) or any(steps)


def _model_differs(loaded: Tokenizer, rules: dict[str, Any]) -> bool:
    kind = type(loaded.model).__name__
    if rules["model"].get("type", kind) != kind:
        return True
    options = {key: value for key, value in rules["model"].items() if hasattr(loaded.model, key)}
    return any((getattr(loaded.model, key) or None) != (value or None) for key, value in options.items())


def _state(step: Any) -> Any:
    return json.loads(step.__getstate__()) if step else None


def _with_rules(loaded: Tokenizer, rules: dict[str, Any], path: Path) -> Tokenizer:
    """Return a tokenizer with the file's rules, and with the loaded tokens where the model is the same."""
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - only where it is used

    if _model_differs(loaded, rules):
        return Backend.from_file(str(path))
    none: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
    }
    steps = {step: rules.get(step) for step in _STEPS}
    shell = Backend.from_str(json.dumps(none | steps | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    shell.model = loaded.model
    return shell


def _first_difference(loaded: Tokenizer, in_file: Tokenizer) -> str | None:
    return (
        _returned_difference(loaded, in_file)
        or _encoded_difference(loaded, in_file)
        or _decoded_difference(loaded, in_file)
    )


def _returned_difference(loaded: Tokenizer, in_file: Tokenizer) -> str | None:
    """Compare what comes back of a sentence that is encoded and decoded."""
    ours, theirs = (_returned(backend) for backend in (loaded, in_file))
    if ours == theirs:
        return None
    return f"it encodes and decodes {SENTENCE!r} to {ours!r}, tokenizer.json to {theirs!r}"


def _returned(backend: Tokenizer) -> str | None:
    encoding = encode(backend, SENTENCE)
    return None if encoding is None else str(backend.decode(encoding.ids)).strip()


def _decoded_difference(loaded: Tokenizer, in_file: Tokenizer) -> str | None:
    """Compare what both write for tokens in the middle of a text, on a sample of the vocabulary."""
    size = loaded.get_vocab_size(with_added_tokens=False)
    for first in range(0, size, max(_RUN, size // _SAMPLES)):
        run = range(first, min(first + _RUN, size))
        ours, theirs = (_in_the_middle(backend, run) for backend in (loaded, in_file))
        if ours != theirs:
            return (
                f"it decodes tokens {run[0]} to {run[-1]} to {ours[:40]!r}, tokenizer.json to {theirs[:40]!r}"
            )
    return None


def _in_the_middle(backend: Tokenizer, run: Sequence[int]) -> str:
    start, text = (backend.decode(ids, skip_special_tokens=False) for ids in ([0], [0, *run]))
    return str(text.removeprefix(start))


def _encoded_difference(loaded: Tokenizer, in_file: Tokenizer) -> str | None:
    ours, theirs = (_behind_first_word(backend) for backend in (loaded, in_file))
    differing = (pair for pair in zip_longest(ours, theirs, fillvalue="nothing") if pair[0] != pair[1])
    if (pair := next(differing, None)) is None:
        return None
    return f"it encodes {_TEXT!r} with {pair[0]} where tokenizer.json has {pair[1]}"


def _behind_first_word(backend: Tokenizer) -> list[str]:
    """Encode the sample text; the first word is left out, since a setting may add a space before it."""
    encoding = encode(backend, _TEXT)
    if encoding is None:
        return ["an error"]
    tokens = zip(encoding.ids, encoding.offsets, strict=True)
    return [f"token {i} ({backend.id_to_token(i)!r})" for i, (start, _) in tokens if start > 0]


def _holds(backend: Tokenizer) -> bool:
    return _returned(backend) == SENTENCE
