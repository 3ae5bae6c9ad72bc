"""Tensors of a safetensors checkpoint, read one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shadowllm.errors import UserError, in_one_line
from shadowllm.models.hashing import hash_files

# What Hugging Face itself puts before the names of a whole model's tensors.
OWN_PREFIXES = ("model.decoder.", "model.", "decoder.")
# How the names of a whole model begin, where its output projection lies beside the rest.
WHOLE_MODEL = ("model.", "decoder.", "lm_head.")
LFS_POINTER = b"version https://git-lfs"
LORA = (".lora_", ".base_layer.", ".ia3_", ".modules_to_save.")


class SafetensorsFiles:
    """The files of a safetensors checkpoint, by Hugging Face's names without ``model.``.

    A prefix that a wrapper has put before every name (``_orig_mod.``, ``module.``) is taken off.

    Attributes:
        foreign_prefix: that prefix; mostly empty.
        dtypes: element type of each tensor, as safetensors writes it ("F32", "BF16", "I8", "F8_E4M3").
        format: what the files say they were written by ("pt", "mlx"), if anything.

    Raises:
        UserError: a damaged or empty file, or LoRA weights that are not merged.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        where: dict[str, Path] = {}
        stored_dtypes: dict[str, str] = {}
        self.format: str | None = None
        for path in files:
            with self._open(path) as file:
                self.format = (file.metadata() or {}).get("format") or self.format
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    where[name], stored_dtypes[name] = path, file.get_slice(name).get_dtype()
        if not where:
            raise UserError(f"{files[0]} holds no tensors", "download the checkpoint again")
        self.foreign_prefix = foreign_prefix(where)
        _refuse_adapters(files[0], where, self.foreign_prefix)
        if self.foreign_prefix:
            warnings.warn(
                f"every tensor in {files[0]} has a name that begins with {self.foreign_prefix!r}: read without it",
                stacklevel=2,
            )
        self._stored = {name.removeprefix(self.foreign_prefix).removeprefix("model."): name for name in where}
        self._where = {name: where[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: stored_dtypes[stored] for name, stored in self._stored.items()}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            if _is_pointer(path):
                raise UserError(
                    f"{path} is a pointer of git-lfs, not the weights", "fetch them: git lfs pull"
                ) from error
            raise UserError(
                f"{path} is damaged or truncated ({in_one_line(error)})", "download the checkpoint again"
            ) from error

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> torch.Tensor:
        # Opened per read: a mapping that lived on would keep every page read so far resident.
        with self._open(self._where[name]) as file:
            return file.get_tensor(self._stored[name])

    def fingerprint(self) -> str:
        return hash_files(self._files)


def _is_pointer(path: Path) -> bool:
    """Whether a file only says where git-lfs keeps the real one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def foreign_prefix(names: Collection[str]) -> str:
    """What stands before every name and is not Hugging Face's own; ends with a dot, or is empty."""
    # All names between the first and the last in order begin as these two do.
    first, last = min(names).split("."), max(names).split(".")
    same = takewhile(lambda parts: parts[0] == parts[1], zip(first[:-1], last[:-1], strict=False))
    prefix = "".join(f"{part}." for part, _ in same)
    if any(name.removeprefix(prefix).startswith(WHOLE_MODEL) for name in names):
        return prefix
    return next((prefix.removesuffix(own) for own in OWN_PREFIXES if prefix.endswith(own)), "")


def _refuse_adapters(path: Path, names: Iterable[str], prefix: str) -> None:
    found = next((name for name in names if any(part in name for part in LORA)), None)
    if found or prefix.startswith("base_model.model."):
        raise UserError(
            f"{path} was saved by peft with its adapter around the model ({found or prefix + '...'})",
            "merge the adapter (peft: merge_and_unload), save the result with save_pretrained, and export that",
        )
