"""A checkpoint's tokenizer, read by `transformers`, and text turned into token ids that the model has rows for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.errors import UserError, foreign_reader, in_one_line
from shadowllm.models.files.lfs import refuse_pointers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these holds the vocabulary; without it there is no tokenizer, whatever else lies in the folder.
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
CONFIG = "tokenizer_config.json"
GGUF_TOKENS = "tokenizer.ggml.tokens"


def has_tokenizer(folder: Path, gguf: str | None) -> bool:
    """Whether a checkpoint holds a tokenizer, readable or not.

    Args:
        folder: of the checkpoint.
        gguf: name of the GGUF file in it, which is the only place looked at then; None for safetensors.
    """
    if gguf:
        from gguf import GGUFReader

        return GGUF_TOKENS in GGUFReader(folder / gguf).fields
    return any(next(folder.glob(pattern), None) for pattern in VOCABULARIES) or _is_custom(folder)


def load_tokenizer(folder: Path, gguf: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint as `AutoTokenizer` reads it, without truncation and padding.

    Args:
        folder: of the checkpoint.
        gguf: name of the GGUF file in it, None for safetensors.
        trust_remote_code: let ``transformers`` run a tokenizer's code from the checkpoint.

    Raises:
        UserError: there is none, or it cannot be read; the message names the file and the cause.
    """
    from transformers import AutoTokenizer

    if not gguf and not has_tokenizer(folder, gguf):
        raise UserError(f"no tokenizer in {folder}", "put tokenizer.json beside the weights")
    if not gguf:
        refuse_pointers([path for pattern in VOCABULARIES for path in folder.glob(pattern)])
    _check_packages(folder, gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **({"gguf_file": gguf} if gguf else {})
        )
    except Exception as error:  # the user's files in other people's parsers, which raise anything
        raise refusal(folder, gguf, error) from error
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def text_encoder(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> Callable[[str], list[int]]:
    """Text to token ids without special tokens: what running text is made of.

    Args:
        rows: of the model's embedding; the function returned refuses tokens beyond them. None takes any.
    """
    return partial(encode, tokenizer, rows=rows, special=False)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, rows: int | None, special: bool) -> list[int]:
    """Text to token ids that the model has a row for each.

    Args:
        rows: of the model's embedding; None takes any id.
        special: add the special tokens that the tokenizer puts around a text.

    Raises:
        UserError: the tokenizer fails, or the model lacks a row, as where tokens were added to the tokenizer alone.
    """
    with foreign_reader(f"the tokenizer cannot read the text {text!r:.60}", "mend the model's tokenizer files"):
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
    """Refuse a vocabulary that an optional package reads, where that is missing."""
    for path in _models(folder, gguf):
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if not _is_sentencepiece(path):
            needed = {"tiktoken": "tiktoken"}
        for package, module in needed.items():
            if not _installed(module):
                extra = package if package == "tiktoken" else "'shadowllm[sentencepiece]'"
                raise UserError(f"{path} is read by the package {package}, which is missing", f"pip install {extra}")


def _models(folder: Path, gguf: str | None) -> list[Path]:
    """Vocabulary files that an optional package reads; none where tokenizer.json makes them needless."""
    if gguf or (folder / "tokenizer.json").is_file():
        return []
    return sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])


def _is_sentencepiece(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\n"  # the tag of a protobuf message's first field; tiktoken's file is lines of Base64


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that this one lies in
        return False


def refusal(folder: Path, gguf: str | None, error: Exception) -> UserError:
    """What is wrong with a tokenizer that could not be read."""
    again = "download the checkpoint again"
    if gguf and not has_tokenizer(folder, gguf):  # asked only now: it takes seconds to look
        return UserError(f"no tokenizer in {folder / gguf}", "take a GGUF file that holds one")
    if gguf:
        return UserError(f"the tokenizer in {folder / gguf} cannot be read ({in_one_line(error)})", again)
    if _is_custom(folder) and "trust_remote_code" in str(error):
        return UserError(
            f"the tokenizer of {folder} is code of its own ({CONFIG}: auto_map)",
            "read the code, and let it run with --trust-remote-code",
        )
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("tokenizer", "special_tokens_map", "added_tokens", "vocab", "tekken")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as cause:
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
        if _is_sentencepiece(path):  # transformers takes a damaged one for tiktoken's
            return UserError(f"{path} cannot be read as a SentencePiece model", again)
    return UserError(
        f"the tokenizer of {folder} cannot be read ({type(error).__name__}: {in_one_line(error)})",
        f"correct its {CONFIG}, or {again}",
    )


def _newer(path: Path) -> str:
    """What the package ``tokenizers`` has against a file that is JSON; empty if nothing."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (tokenizers raises nothing more specific)
        return in_one_line(error)
    return ""


def _is_custom(folder: Path) -> bool:
    """Whether a tokenizer's class lies in the checkpoint."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a damaged file is named when the tokenizer is loaded
        return False
    return isinstance(config, dict) and "auto_map" in config
