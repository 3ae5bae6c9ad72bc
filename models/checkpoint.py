"""Open a checkpoint: a local folder, a GGUF file or a Hugging Face id; tensors are read lazily."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shadowllm.errors import UserError
from shadowllm.models.gguf_file import GGUFTensors
from shadowllm.models.weights import TensorFile

INDEX = "model.safetensors.index.json"
# What a download needs: no pickled weights, no other framework's copies.
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.gguf", "tokenizer*", "*.model", "*.txt"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model.

    Attributes:
        folder: local folder they lie in.
        gguf: name of the GGUF file in it, None for safetensors.
        config: the Hugging Face config object.
        tensors: the weights, by Hugging Face name.
        trust_remote_code: as the caller allowed it.
    """

    folder: Path
    gguf: str | None
    config: Any
    tensors: TensorFile
    trust_remote_code: bool = False

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that belongs to the checkpoint.

        Raises:
            UserError: the folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, **self._gguf_argument()
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"no tokenizer in {self.folder} ({_first_line(error)})", "put tokenizer.json beside the weights"
            ) from error

    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer: a GGUF file always does."""
        return self.gguf is not None or any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    def _gguf_argument(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def open_checkpoint(model: str | Path, cache_dir: Path | None, trust_remote_code: bool) -> Checkpoint:
    """Find the files of ``model`` and read its config; weights stay on disk.

    Raises:
        UserError: nothing there, several GGUF files, pickled weights only, or an unreadable config.
    """
    folder, gguf = _locate(str(model), cache_dir)
    config = _read_config(folder, gguf, trust_remote_code)
    tensors: TensorFile = GGUFTensors(folder / gguf, config) if gguf else SafetensorsFiles(folder)
    return Checkpoint(folder, gguf, config, tensors, trust_remote_code)


def _locate(model: str, cache_dir: Path | None) -> tuple[Path, str | None]:
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, path.name
    if not path.is_dir():
        path = _download(model, cache_dir)
    if (path / INDEX).is_file() or list(path.glob("*.safetensors")):
        return path, None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} GGUF files", f"name one, for example {found[0]}")
    if not found:
        raise UserError(
            f"no model weights in {path}",
            "a model folder holds *.safetensors or one *.gguf file "
            "(pickled *.bin weights are not read: convert them to safetensors)",
        )
    return path, found[0].name


def _download(model: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"no such model: {model}", "give a local folder, a .gguf file or a Hugging Face id (owner/name)"
        )
    try:
        return Path(snapshot_download(model, cache_dir=cache_dir, allow_patterns=DOWNLOAD_PATTERNS))
    except (OSError, ValueError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"no such model: {model} is no local folder, and it cannot be had from the hub ({_first_line(error)})",
            "check the name and the network, or download it and give the folder",
        ) from error


def _read_config(folder: Path, gguf: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    extra = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        where = folder / (gguf or "config.json")
        raise UserError(
            f"cannot read the model configuration of {where} ({_first_line(error)})",
            "the file is missing, damaged, or of an unsupported family",
        ) from error


class SafetensorsFiles:
    """The shards of a safetensors checkpoint, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._files = self._shards(folder)
        self._where: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        for path in self._files:
            with self._open(path) as file:
                for stored in file.keys():  # noqa: SIM118  (not a dict)
                    name = stored.removeprefix("model.")
                    self._where[name], self._stored[name] = path, stored

    @staticmethod
    def _shards(folder: Path) -> list[Path]:
        index = folder / INDEX
        if not index.is_file():
            return sorted(folder.glob("*.safetensors"))
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a readable shard index", "download the checkpoint again") from error
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise UserError(f"shard {missing[0]} named by {index} is missing", "download the checkpoint again")
        return [folder / name for name in names]

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({_first_line(error)})", "download the checkpoint again"
            ) from error

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> torch.Tensor:
        # Opened per read: a mapping that lived on would keep every page read so far resident.
        with self._open(self._where[name]) as file:
            return file.get_tensor(self._stored[name])

    def fingerprint(self) -> str:
        return hash_files(self._files)


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
