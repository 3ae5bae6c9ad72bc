"""Tensors of a GGUF model (ggml's quantised checkpoint format), dequantised one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.files.gguf_config import USE_SAFETENSORS, gguf_config
from shadowllm.models.files.hashing import hash_files

# Hugging Face names of the modules in a layer. The gguf package maps them to GGUF names.
_BLOCKS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # of Qwen3
_TABLES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
ROPE_FACTORS = "rope_freqs.weight"
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
        self.dtypes: dict[str, str] = {}
        self._check_count()
        shapes = {name: tensor.shape[::-1].tolist() for name, tensor in self._tensors.items()}
        self.config = gguf_config(self.metadata, shapes, self._rope_factors())
        # Only Llama's rows are stored in another order.
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        self._heads = heads if self.config.model_type == "llama" else {}
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

    def _rope_factors(self) -> np.ndarray | None:
        if ROPE_FACTORS not in self._tensors:
            return None
        return np.asarray(self._tensors[ROPE_FACTORS].data, dtype=np.float64)

    def _map(self, gguf: Any, n_layers: int) -> dict[str, str]:
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.config.model_type.upper()], n_layers)
        blocks = (*_BLOCKS, *_HEAD_NORMS) if self.config.model_type == "qwen3" else _BLOCKS
        modules = [f"layers.{i}.{block}" for i in range(n_layers) for block in blocks]
        stored_names = {
            f"{m}.{kind}": f"{known.get_name('model.' + m)}.{kind}"
            for m in modules
            for kind in ("weight", "bias")
            if kind == "weight" or self._has_bias(m)
        }
        stored_names |= {f"{table}.weight": f"{stored}.weight" for table, stored in _TABLES.items()}
        return {name: stored for name, stored in stored_names.items() if stored in self._tensors}

    def _has_bias(self, module: str) -> bool:
        _, _, block, *part = module.split(".")
        if self.config.model_type == "qwen2":
            return part in (["q_proj"], ["k_proj"], ["v_proj"])
        option = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(block)
        return bool(option and getattr(self.config, option, False))

    def _check_tensors(self) -> None:
        unread = sorted(self._tensors.keys() - set(self._names.values()) - {ROPE_FACTORS})
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
        if module in self._heads:
            array = _unpermute(array, self._heads[module])
        return torch.from_numpy(np.require(array, requirements=("C", "W")))

    def fingerprint(self) -> str:
        return hash_files(self.parts)


def _open(reader: Any, path: Path) -> Any:
    with foreign_reader(f"{path} is damaged, truncated or no GGUF file", "download the GGUF file again"):
        opened = reader(path)
    if opened.byte_order == "S":
        raise UserError(f"{path} is written for machines of the other byte order", "convert it: gguf-convert-endian")
    return opened


def _unpermute(array: np.ndarray, n_heads: int) -> np.ndarray:
    # ggml interleaves the two halves of each rotated head; Hugging Face stores one after the other.
    pairs = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
