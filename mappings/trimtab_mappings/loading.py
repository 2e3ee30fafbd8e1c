"""Tokenizers, vocabularies and encoders from a directory or a hub id, as vLLM would load them."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trimtab_mappings.encoder import ByteEncoder
from trimtab_mappings.tokenizer_file import follow_file
from trimtab_mappings.vocabulary import Vocabulary, VocabularyError, backend_of, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_TOKENIZER_FILE = re.compile(r"token|vocab|tekken|merges|spiece|spm|\.model", re.IGNORECASE)
_SENTENCEPIECE_FILES = ("tokenizer.model.v*", "spiece.model", "spm.model", "sentencepiece*.model")
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_MISTRAL_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def load_tokenizer(path_or_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer in a directory or of a hub id; code that comes with it is never run.

    Besides everything that transformers reads (tekken.json and tiktoken files too), it reads a directory
    with Mistral's own `tokenizer.model.v*`, as vLLM does with `--tokenizer-mode mistral`, and one with
    nothing but a SentencePiece model under another of its usual names, such as T5's `spiece.model`. If
    transformers reads a `tokenizer.json` by other rules than the file's, the file's count: see `follow_file`.

    Raises:
        VocabularyError: there is no tokenizer, or only a slow one, or its files contradict each other.
    """
    return _load_checked(path_or_id, revision, local=_is_local(path_or_id, revision))


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


def generation_eos(path_or_id: str, revision: str | None = None, *, local: bool = False) -> tuple[int, ...]:
    """All tokens that end a generation by the model's generation config; none where it can't be read.

    Args:
        path_or_id: a directory or a hub id.
        revision: of the hub id.
        local: only files on this machine are read; the hub is not asked.
    """
    from transformers import GenerationConfig  # noqa: PLC0415 - heavy: only where it is used

    try:
        config = GenerationConfig.from_pretrained(path_or_id, revision=revision, local_files_only=local)
    except (OSError, TypeError, ValueError) as error:
        if (file := Path(path_or_id) / "generation_config.json").exists():
            _log.warning("%s can't be read, what it says of end tokens does not count: %s", file, error)
        return ()
    eos = config.eos_token_id
    listed = eos if isinstance(eos, list) else [eos]
    return tuple(token_id for token_id in listed if type(token_id) is int)  # no bool


def leave_out_torch() -> None:
    """Let transformers be imported without torch and thus without models, which takes a fifth of the time.

    That is for a process that reads tokenizers and runs no models. If torch or transformers is imported
    already, nothing changes.
    """
    _Torch.left_out = True


class _Torch:
    left_out = False


def _import_transformers() -> None:
    if not _Torch.left_out or {"torch", "transformers"} & sys.modules.keys():
        return
    advice = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"  # to install torch
    sys.modules["torch"] = cast("Any", None)  # it can't be imported while that is so
    try:
        from transformers import AutoTokenizer, GenerationConfig  # noqa: F401, PLC0415 - only for this
    finally:
        del sys.modules["torch"], os.environ[_NO_ADVICE]
        if advice is not None:
            os.environ[_NO_ADVICE] = advice


def _read(path_or_id: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    local = _is_local(path_or_id, revision)
    tokenizer = _load_checked(path_or_id, revision, local=local)
    return tokenizer, read_vocabulary(
        tokenizer, path_or_id, generation_eos(path_or_id, revision, local=local)
    )


def _load_checked(path_or_id: str, revision: str | None, *, local: bool) -> PreTrainedTokenizerBase:
    if fault := _fault(path_or_id):
        raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {fault}")
    _import_transformers()
    try:
        tokenizer = _load_any(path_or_id, revision, local=local)
    except Exception as error:  # transformers lets through whatever a malformed file raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {reason}") from error
    backend_of(tokenizer, path_or_id)
    return follow_file(tokenizer, path_or_id, revision)


def _is_local(path_or_id: str, revision: str | None) -> bool:
    """Whether only files on this machine can be read: it is a path, or the hub does not answer.

    The hub is asked once, without the retries that the loading of every single file would make.

    Raises:
        VocabularyError: the hub does not answer, and its cache has nothing of this id.
    """
    if Path(path_or_id).exists() or _fault(path_or_id):
        return True
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        get_hf_file_metadata(hf_hub_url(path_or_id, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):
        return False  # an answer, if only that there is no such file
    except Exception as no_answer:  # noqa: BLE001 - of the HTTP library that the hub's client uses
        try:
            snapshot_download(path_or_id, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            reason = f"there is no such directory, and the hub does not answer ({no_answer})"
            raise VocabularyError(f"no tokenizer can be loaded from {path_or_id!r}: {reason}") from no_answer
        return True
    return False


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


def _load_any(path_or_id: str, revision: str | None, *, local: bool) -> PreTrainedTokenizerBase:
    try:
        return _load(path_or_id, revision, local=local)
    except (OSError, ValueError):
        if (model := _sentencepiece_model(Path(path_or_id))) is None:
            raise
        return _load_sentencepiece(model)


def _sentencepiece_model(directory: Path) -> Path | None:
    """A model file that transformers does not look for by its name; of several versions, the newest."""
    found = (max(directory.glob(pattern), default=None) for pattern in _SENTENCEPIECE_FILES)
    return next(filter(None, found), None)


def _load(path_or_id: str, revision: str | None = None, *, local: bool = True) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy: only where it is used

    # tiktoken would keep a copy of a file by its path, and read the copy when the file is another
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    # beside a tekken.json transformers would choose Mistral's own tokenizer, which is no fast one
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path_or_id,
        revision=revision,
        local_files_only=local,
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
        (link := Path(directory) / "tokenizer.model").symlink_to(model.absolute())
        try:
            return _load(directory)
        except Exception as error:  # a malformed file raises whatever it likes
            text = str(error).replace(str(link), str(model)).replace(directory, str(model.parent))
            raise ValueError(text) from error
