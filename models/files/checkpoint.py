"""Open a checkpoint from a local folder, a GGUF file or the Hugging Face hub. Tensors are read lazily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowllm.errors import UserError
from shadowllm.limits import check_path
from shadowllm.models.files import tokenizer, weight_files
from shadowllm.models.files.config import read_config, read_generation_config
from shadowllm.models.files.dequantise import DequantisedTensors
from shadowllm.models.files.gguf_file import GGUFTensors
from shadowllm.models.files.hub import download
from shadowllm.models.files.lfs import refuse_pointers
from shadowllm.models.files.lora_adapter import LoraAdapter
from shadowllm.models.files.quantised_checkpoint import plain_tensors
from shadowllm.models.files.safetensors_file import SafetensorsFiles
from shadowllm.models.weights import TensorFile


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model.

    Attributes:
        folder: local folder that contains them.
        gguf: name of the GGUF file in it (the first part of a split model); None for safetensors.
        config: the Hugging Face config object.
        generation_config: the Hugging Face generation config; it defines the model's stop tokens.
        tensors: the weights as floats, by Hugging Face name, without the adapter.
        renamed: stored name -> Hugging Face name, for tensors that a wrapper renamed.
        quantised: whether the tensors are stored as integers or float8 with scales.
        trust_remote_code: whether the caller allowed code from the checkpoint.
        adapter: the LoRA adapter to merge into the weights.
    """

    folder: Path
    gguf: str | None
    config: Any
    generation_config: Any
    tensors: TensorFile
    renamed: Mapping[str, str] = field(default_factory=dict)
    quantised: bool = False
    trust_remote_code: bool = False
    adapter: LoraAdapter | None = None
    _read: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def tokenizer(self) -> Any:
        """Return the checkpoint's Hugging Face tokenizer, which is read once; see `load_tokenizer`."""
        if "tokenizer" not in self._read:
            self._read["tokenizer"] = tokenizer.load_tokenizer(self.folder, self.gguf, self.trust_remote_code)
        return self._read["tokenizer"]

    def has_tokenizer(self) -> bool:
        """Whether the checkpoint holds a tokenizer."""
        if isinstance(self.tensors, GGUFTensors):
            return self.tensors.has_tokenizer
        return tokenizer.has_tokenizer(self.folder, None)


def open_checkpoint(model: str | Path, cache_dir: Path | None, trust_remote_code: bool) -> Checkpoint:
    """Find the files of ``model`` and read its config. The weights stay on disk.

    Raises:
        UserError: there is no model or several GGUF models, the weights are pickled, it is an adapter or a bundle, or
            the config or the quantisation cannot be read.
    """
    path = _local(str(model), cache_dir)
    if path.is_file():
        return _open_gguf(path)
    config = read_config(path, trust_remote_code) if (path / "config.json").is_file() else None
    files = weight_files.safetensors_files(path, getattr(config, "transformers_weights", None))
    if not files:
        gguf = weight_files.gguf_file(path)
        if gguf is None:
            weight_files.refuse_what_is_no_model(path)
        return _open_gguf(path / str(gguf))
    refuse_pointers(files)
    config = config or read_config(path, trust_remote_code)
    stored = SafetensorsFiles(files)
    tensors = plain_tensors(stored, config, path)
    return Checkpoint(
        path,
        None,
        config,
        read_generation_config(path, config),
        tensors,
        stored.renamed,
        isinstance(tensors, DequantisedTensors),
        trust_remote_code,
    )


def _local(model: str, cache_dir: Path | None) -> Path:
    """Return the local folder or GGUF file of a model; download it if it is not local."""
    path = check_path("the model", model)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(f"{path} is one file", "give the folder it lies in, with config.json, or a .gguf file")
    return download(model, cache_dir)


def _open_gguf(path: Path) -> Checkpoint:
    from transformers import GenerationConfig

    parts = weight_files.gguf_parts(path)
    refuse_pointers(parts)
    tensors = GGUFTensors(parts)
    generation = GenerationConfig.from_model_config(tensors.config)
    return Checkpoint(path.parent, parts[0].name, tensors.config, generation, tensors)
