"""Read the tensors of a safetensors checkpoint, one at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shadowllm.errors import UserError, in_one_line
from shadowllm.models.files.hashing import hash_files

# Prefixes that Hugging Face itself adds to the tensor names of a complete model.
OWN_PREFIXES = ("model.decoder.", "model.", "decoder.")
# Tensor names of a complete model, including the output projection, start with one of these.
WHOLE_MODEL = ("model.", "decoder.", "lm_head.")
# Parts that wrappers of inner modules add to names: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LORA = (".lora_", ".base_layer.", ".ia3_", ".modules_to_save.")


class SafetensorsFiles:
    """The tensors of a safetensors checkpoint, by Hugging Face's names without ``model.``.

    Prefixes (``module.``) and inner parts (``_orig_mod.``) that wrappers added to names are removed.

    Attributes:
        renamed: stored name -> Hugging Face name, for the names that were changed.
        dtypes: element type of each tensor, as safetensors writes it ("F32", "BF16", "I8", "F8_E4M3").
        format: the framework that wrote the files ("pt", "mlx"), if they record it.

    Raises:
        UserError: a file is damaged or empty, LoRA weights are not merged, or a tensor has two names.
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
        prefix = foreign_prefix(where)
        _refuse_adapters(files[0], where, prefix)
        clean = {stored: WRAPPERS.sub("", stored.removeprefix(prefix)) for stored in where}
        self.renamed = {stored: name for stored, name in clean.items() if stored != name}
        if self.renamed:
            _warn_of_wrappers(files[0], prefix, self.renamed)
        self._stored: dict[str, str] = {}
        for stored, name in clean.items():
            twin = self._stored.setdefault(name.removeprefix("model."), stored)
            if twin != stored:
                raise UserError(
                    f"{where[stored]} holds both {twin} and {stored}", "remove the one that is not the model's"
                )
        self._where = {name: where[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: stored_dtypes[stored] for name, stored in self._stored.items()}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({in_one_line(error)})", "download the checkpoint again"
            ) from error

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> torch.Tensor:
        # The file is opened for each read: a longer mapping would keep all pages read so far in memory.
        with self._open(self._where[name]) as file:
            return file.get_tensor(self._stored[name])

    def fingerprint(self) -> str:
        return hash_files(self._files)


def foreign_prefix(names: Collection[str]) -> str:
    """Return the common prefix of all names, without Hugging Face's own; it ends with a dot or is empty."""
    # The common prefix of the first and last name in sorted order is common to all names.
    first, last = min(names).split("."), max(names).split(".")
    same = takewhile(lambda parts: parts[0] == parts[1], zip(first[:-1], last[:-1], strict=False))
    prefix = "".join(f"{part}." for part, _ in same)
    if any(name.removeprefix(prefix).startswith(WHOLE_MODEL) for name in names):
        return prefix
    return next((prefix.removesuffix(own) for own in OWN_PREFIXES if prefix.endswith(own)), "")


def _warn_of_wrappers(path: Path, prefix: str, renamed: Mapping[str, str]) -> None:
    if prefix:
        found = f"every tensor in {path} has a name that begins with {prefix!r}: read without it"
    else:
        stored, name = next(iter(renamed.items()))
        found = f"names in {path} come from a wrapper of the model: {stored} and the like are read as {name}"
    warnings.warn(found, stacklevel=3)


def _refuse_adapters(path: Path, names: Iterable[str], prefix: str) -> None:
    found = next((name for name in names if any(part in name for part in LORA)), None)
    if found or prefix.startswith("base_model.model."):
        raise UserError(
            f"{path} was saved by peft with its adapter around the model ({found or prefix + '...'})",
            "merge the adapter (peft: merge_and_unload), save the result with save_pretrained, and export that",
        )
