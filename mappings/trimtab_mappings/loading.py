"""Tokenizers, vocabularies and encoders from a directory or a hub id, as vLLM would load them."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab_mappings.encoder import ByteEncoder
from trimtab_mappings.vocabulary import Vocabulary, VocabularyError, backend_of, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_TOKENIZER_FILE = re.compile(r"token|vocab|tekken|merges|spiece|spm|\.model", re.IGNORECASE)
_MISTRAL_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def load_tokenizer(path_or_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer in a directory or of a hub id; code that comes with it is never run.

    Besides everything that transformers reads (tekken.json and tiktoken files too), it reads a directory
    with Mistral's own `tokenizer.model.v*`, as vLLM does with `--tokenizer-mode mistral`.

    Raises:
        VocabularyError: there is no tokenizer, or only a slow one.
    """
    if fault := _fault(path_or_id):
        raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {fault}")
    try:
        tokenizer = _load_any(path_or_id, revision)
    except Exception as error:  # transformers lets through whatever a malformed file raises
        reason = f"{type(error).__name__}: {error}"
        raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {reason}") from error
    backend_of(tokenizer, path_or_id)
    return tokenizer


def load_vocabulary(path_or_id: str, revision: str | None = None) -> Vocabulary:
    """Read the vocabulary in a directory or of a hub id, with the generation config's end-of-sequence tokens.

    Raises:
        VocabularyError: the tokenizer can't be loaded, or not be read as bytes.
    """
    return _read(path_or_id, revision)[1]


def load_encoder(path_or_id: str, revision: str | None = None) -> ByteEncoder:
    """The encoder, and with it the vocabulary, of the model in a directory or of a hub id.

    Raises:
        VocabularyError: the tokenizer can't be loaded, or not be read as bytes.
    """
    return ByteEncoder(*_read(path_or_id, revision))


def generation_eos(path_or_id: str, revision: str | None = None) -> tuple[int, ...]:
    """All tokens that end a generation by the model's generation config; none where it can't be read."""
    from transformers import GenerationConfig  # noqa: PLC0415 - heavy: only where it is used

    try:
        eos = GenerationConfig.from_pretrained(path_or_id, revision=revision).eos_token_id
    except (OSError, TypeError, ValueError) as error:
        if (file := Path(path_or_id) / "generation_config.json").exists():
            _log.warning("%s can't be read, what it says of end tokens does not count: %s", file, error)
        return ()
    listed = eos if isinstance(eos, list) else [eos]
    return tuple(token_id for token_id in listed if type(token_id) is int)  # no bool


def _read(path_or_id: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    tokenizer = load_tokenizer(path_or_id, revision)
    return tokenizer, read_vocabulary(tokenizer, path_or_id, generation_eos(path_or_id, revision))


def _fault(path_or_id: str) -> str | None:
    """What is plainly wrong with a path, before transformers takes it for something else."""
    path = Path(path_or_id)
    if path.is_file():
        return "it is a file; name the directory of the model"
    if path.is_dir() and not any(_TOKENIZER_FILE.search(file.name) for file in path.iterdir()):
        return "there are no files of a tokenizer in it"
    if not path.exists() and (path.is_absolute() or path_or_id.startswith((".", "~"))):
        return "there is no such directory"
    return None


def _load_any(path_or_id: str, revision: str | None) -> PreTrainedTokenizerBase:
    native = max(Path(path_or_id).glob("tokenizer.model.v*"), default=None)
    try:
        return _load(path_or_id, revision)
    except (OSError, ValueError):
        if native is None:
            raise
        return _load_sentencepiece(native)


def _load(path_or_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy: only where it is used

    # tiktoken would keep a copy of a file by its path, and read the copy when the file is another
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    # beside a tekken.json transformers would choose Mistral's own tokenizer, which is no fast one
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path_or_id,
        revision=revision,
        trust_remote_code=False,
        mistral_format=False,
        fix_mistral_regex=False,  # as vLLM reads it; without a warning that asks for a flag
    )
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        # all that transformers knows of some kinds of model without files
        raise ValueError("there are no tokens but special ones")
    if tokenizer.eos_token is None and "[INST]" in tokenizer.get_added_vocab():
        # a tekken.json names its special tokens, but not their roles
        tokenizer.add_special_tokens(
            {role: token for role, token in _MISTRAL_ROLES.items() if token in tokenizer.get_added_vocab()}
        )
    return tokenizer


def _load_sentencepiece(model: Path) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.model").symlink_to(model.absolute())
        return _load(directory)
