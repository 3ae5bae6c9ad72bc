"""Read a checkpoint's tokenizer with `transformers`, and encode text to token ids that the model knows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.errors import UserError, foreign_reader, in_one_line
from shadowllm.models.files.gguf_tokenizer import read_gguf_tokenizer
from shadowllm.models.files.lfs import refuse_pointers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that hold a vocabulary. A folder has a tokenizer if it has one of them, or a tokenizer class of its own.
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
CONFIG = "tokenizer_config.json"
GGUF_TOKENS = "tokenizer.ggml.tokens"


def has_tokenizer(folder: Path, gguf: str | None) -> bool:
    """Whether a checkpoint holds a tokenizer, readable or not.

    Args:
        folder: of the checkpoint.
        gguf: name of the GGUF file in it; if given, only this file is searched. None for safetensors.
    """
    if gguf:
        from gguf import GGUFReader

        return GGUF_TOKENS in GGUFReader(folder / gguf).fields
    return any(next(folder.glob(pattern), None) for pattern in VOCABULARIES) or _is_custom(folder)


def load_tokenizer(folder: Path, gguf: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer with `AutoTokenizer`, without truncation and padding.

    Args:
        folder: of the checkpoint.
        gguf: name of the GGUF file in it, None for safetensors.
        trust_remote_code: let ``transformers`` run tokenizer code from the checkpoint.

    Raises:
        UserError: there is no tokenizer, or it cannot be read; the message names the file and the cause.
    """
    if not gguf and not has_tokenizer(folder, gguf):
        raise UserError(f"no tokenizer in {folder}", "put tokenizer.json beside the weights")
    if not gguf:
        refuse_pointers([path for pattern in VOCABULARIES for path in folder.glob(pattern)])
    _check_packages(folder, gguf)
    try:
        tokenizer = _read(folder, gguf, trust_remote_code)
    except Exception as error:  # third-party parsers raise any type on damaged files
        raise refusal(folder, gguf, error) from error
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _read(folder: Path, gguf: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if gguf:
        return read_gguf_tokenizer(folder / gguf, trust_remote_code)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def text_encoder(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> Callable[[str], list[int]]:
    """Return a function that encodes text to token ids without special tokens.

    Args:
        rows: rows of the model's embedding; the returned function refuses larger ids. None accepts any id.
    """
    return partial(encode, tokenizer, rows=rows, special=False)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, rows: int | None, special: bool) -> list[int]:
    """Encode text to token ids, and check that the model's embedding has a row for each.

    Args:
        rows: rows of the model's embedding; None accepts any id.
        special: add the tokenizer's special tokens around the text.

    Raises:
        UserError: the tokenizer fails, or a row is missing, for example because only the tokenizer was extended.
    """
    with foreign_reader(f"the tokenizer cannot read the text {text!r:.60}", "correct the model's tokenizer files"):
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    beyond = next((token for token in ids if rows is not None and token >= rows), None)
    if beyond is not None:
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise UserError(
            f"the text has the token {token!r} with id {beyond}, and the model has only {rows} tokens",
            "take it out of the text, or use a model whose embedding was resized for this tokenizer",
        )
    return ids


def _check_packages(folder: Path, gguf: str | None) -> None:
    """Refuse a vocabulary if the optional package that reads it is missing."""
    for path in _models(folder, gguf):
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if not _is_sentencepiece(path):
            needed = {"tiktoken": "tiktoken"}
        for package, module in needed.items():
            if not _installed(module):
                extra = package if package == "tiktoken" else "'shadowllm[sentencepiece]'"
                raise UserError(f"{path} is read by the package {package}, which is missing", f"pip install {extra}")


def _models(folder: Path, gguf: str | None) -> list[Path]:
    """Return the vocabulary files that need an optional package; none if there is a tokenizer.json."""
    if gguf or (folder / "tokenizer.json").is_file():
        return []
    return sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])


def _is_sentencepiece(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\n"  # tag of the first protobuf field; tiktoken files are Base64


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def refusal(folder: Path, gguf: str | None, error: Exception) -> UserError:
    """Return an error that explains why a tokenizer could not be read."""
    again = "download the checkpoint again"
    if gguf and not has_tokenizer(folder, gguf):  # checked only here, because it takes seconds
        return UserError(f"no tokenizer in {folder / gguf}", "take a GGUF file that holds one")
    if gguf:
        return UserError(
            f"the tokenizer in {folder / gguf} cannot be read ({in_one_line(error)})",
            "a newer version of transformers may read it; if not, use the safetensors checkpoint of this model",
        )
    if _is_custom(folder) and "trust_remote_code" in str(error):
        return UserError(
            f"the tokenizer of {folder} is code of its own ({CONFIG}: auto_map)",
            "read the code, and let it run with --trust-remote-code",
        )
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("tokenizer", "special_tokens_map", "added_tokens", "vocab", "tekken")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as cause:
                return UserError(f"{path} is damaged or cut short ({in_one_line(cause)})", again)
    whole = folder / "tokenizer.json"
    if whole.is_file() and (unreadable := _newer(whole)):
        import tokenizers

        return UserError(
            f"{whole} cannot be read by tokenizers {tokenizers.__version__} ({unreadable})",
            "it may be of a newer version: pip install --upgrade tokenizers transformers",
        )
    if (folder / "vocab.json").is_file() and not whole.is_file() and not (folder / "merges.txt").is_file():
        return UserError(f"{folder} has vocab.json, and neither merges.txt nor tokenizer.json", again)
    for path in _models(folder, gguf):
        if _is_sentencepiece(path):  # transformers mistakes a damaged one for a tiktoken file
            return UserError(f"{path} cannot be read as a SentencePiece model", again)
    return UserError(
        f"the tokenizer of {folder} cannot be read ({type(error).__name__}: {in_one_line(error)})",
        f"correct its {CONFIG}, or {again}",
    )


def _newer(path: Path) -> str:
    """Return why the package ``tokenizers`` cannot read a JSON file; empty if it can."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (tokenizers raises nothing more specific)
        return in_one_line(error)
    return ""


def _is_custom(folder: Path) -> bool:
    """Whether the tokenizer's class is stored in the checkpoint."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # loading the tokenizer reports a damaged file
        return False
    return isinstance(config, dict) and "auto_map" in config
