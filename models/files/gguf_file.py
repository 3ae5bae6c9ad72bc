"""Tensors of a GGUF model (ggml's quantised checkpoint format), dequantised one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.files.gguf_architectures import read_architecture
from shadowllm.models.files.gguf_config import END_OF_TURN, gguf_config
from shadowllm.models.files.gguf_keys import USE_SAFETENSORS
from shadowllm.models.files.hashing import hash_files

_TABLES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
TOKENS = "tokenizer.ggml.tokens"
LONGEST_LIST = 4096  # longer lists belong to the vocabulary; converting them to Python lists takes seconds


class GGUFTensors:
    """A GGUF model in one or several files, under Hugging Face's tensor names.

    Attributes:
        config: the Hugging Face config that its metadata describes.
        metadata: keys and values of the first file, without the vocabulary.
        has_tokenizer: whether the first file holds a vocabulary.
        parts: the files.
        dtypes: empty, because `read` always returns floats.

    Raises:
        UserError: a file is damaged, has another architecture, or holds something that is not supported.
    """

    def __init__(self, parts: list[Path]) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UserError("reading GGUF needs the gguf package", "pip install 'shadowllm[gguf]'") from error
        self.parts, self._dequantize = parts, gguf.dequantize
        readers = [_open(gguf.GGUFReader, part) for part in parts]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        fields = readers[0].fields
        self.metadata = {name: field.contents() for name, field in fields.items() if len(field.data) <= LONGEST_LIST}
        self.has_tokenizer = TOKENS in fields
        ends = _token_ids(fields[TOKENS], END_OF_TURN) if self.has_tokenizer else []
        self.dtypes: dict[str, str] = {}
        self._check_count()
        shapes = {name: tensor.shape[::-1].tolist() for name, tensor in self._tensors.items()}
        self._architecture = read_architecture(self.metadata)
        self.config = gguf_config(self._architecture, self.metadata, shapes, self._rope_tables(), ends)
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        self._interleaved = heads if self._architecture.interleaved else {}
        self._names = self._map(gguf, self.config.num_hidden_layers)
        self._check_tensors()

    def _check_count(self) -> None:
        count = self.metadata.get("split.count", 1)
        if count != len(self.parts):
            raise UserError(
                f"{self.parts[0]} says it is one of {count} parts",
                "keep the parts in one folder under their own names, NAME-00001-of-0000N.gguf",
            )
        total = self.metadata.get("split.tensors.count")
        if total is not None and total != len(self._tensors):
            raise UserError(
                f"the parts of {self.parts[0]} hold {len(self._tensors)} of {total} tensors",
                "the model is incomplete: download all parts again",
            )

    def _rope_tables(self) -> dict[str, np.ndarray]:
        stored = {name: self._tensors[name] for name in self._architecture.tables if name in self._tensors}
        return {name: np.asarray(tensor.data, dtype=np.float64) for name, tensor in stored.items()}

    def _map(self, gguf: Any, n_layers: int) -> dict[str, str]:
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self._architecture.name.upper()], n_layers)
        stored_names = {f"{table}.weight": f"{stored}.weight" for table, stored in _TABLES.items()}
        for module in (f"layers.{i}.{part}" for i in range(n_layers) for part in self._architecture.layer):
            stored = known.get_name(f"model.{module}")
            stored_names[f"{module}.weight"] = f"{stored}.weight"
            if self._has_bias(stored):
                stored_names[f"{module}.bias"] = f"{stored}.bias"
        return {name: stored for name, stored in stored_names.items() if stored in self._tensors}

    def _has_bias(self, stored: str) -> bool:
        part = stored.split(".")[-1]
        if part in self._architecture.biases:
            return bool(getattr(self.config, "attention_bias", True))
        return part in _MLP and bool(getattr(self.config, "mlp_bias", False))

    def _check_tensors(self) -> None:
        unread = sorted(self._tensors.keys() - set(self._names.values()) - set(self._architecture.tables))
        if unread:
            raise UserError(
                f"{self.parts[0]} holds {len(unread)} tensors that the model does not have, such as {unread[0]}",
                USE_SAFETENSORS,
            )
        kinds = {self._tensors[stored].tensor_type: stored for stored in self._names.values()}
        for kind, stored in kinds.items():
            try:
                self._dequantize(self._tensors[stored].data[:1], kind)
            except NotImplementedError as error:
                raise UserError(
                    f"the tensor {stored} of {self.parts[0]} is of type {kind.name}, which gguf does not read",
                    "use a file of another type, such as Q8_0 or F16",
                ) from error

    def names(self) -> set[str]:
        return set(self._names)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[self._names[name]]
        array = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        module = name.split(".")[-2]
        if module in self._interleaved:
            array = _unpermute(array, self._interleaved[module])
        if module.endswith("norm"):
            array = array - np.float32(self._architecture.norm_shift)
        return torch.from_numpy(np.require(array, requirements=("C", "W")))

    def fingerprint(self) -> str:
        return hash_files(self.parts)


def _open(reader: Any, path: Path) -> Any:
    with foreign_reader(f"{path} is damaged, truncated or no GGUF file", "download the GGUF file again"):
        opened = reader(path)
    if opened.byte_order == "S":
        raise UserError(f"{path} is written for machines of the other byte order", "convert it: gguf-convert-endian")
    return opened


def _token_ids(tokens: Any, texts: Sequence[str]) -> list[int]:
    wanted = {text.encode() for text in texts}
    return [token for token, part in enumerate(tokens.data) if tokens.parts[part].tobytes() in wanted]


def _unpermute(array: np.ndarray, n_heads: int) -> np.ndarray:
    # ggml interleaves the two halves of each rotated head; Hugging Face stores one after the other.
    pairs = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
