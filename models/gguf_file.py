"""Tensors of a GGUF file (ggml's quantised checkpoint format), dequantised one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shadowllm.errors import UserError

# Hugging Face module names whose GGUF names the gguf package knows, without the layer number.
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
_TABLES = ("embed_tokens", "norm", "lm_head")


class GGUFTensors:
    """A Llama-architecture GGUF file under Hugging Face's tensor names.

    Raises:
        UserError: the file is truncated, of another architecture, or carries RoPE factors.
    """

    def __init__(self, path: Path, config: Any) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UserError("reading GGUF needs the gguf package", "pip install gguf") from error
        if config.model_type != "llama":
            raise UserError(f"GGUF of family {config.model_type!r} is not supported", "use a Llama GGUF or safetensors")
        try:
            self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise UserError(f"{path} is damaged or truncated", "download the GGUF file again") from error
        if "rope_freqs.weight" in self._tensors:
            raise UserError(
                f"{path} carries RoPE frequency factors, which are not read from GGUF",
                "use the safetensors checkpoint of this model",
            )
        self._path = path
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._names = self._map(gguf, config.num_hidden_layers)
        self._dequantize = gguf.dequantize

    def _map(self, gguf: Any, n_layers: int) -> dict[str, str]:
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layers)
        modules = [f"layers.{i}.{block}" for i in range(n_layers) for block in _BLOCKS]
        theirs = {
            f"{m}.{kind}": f"{known.get_name('model.' + m)}.{kind}" for m in modules for kind in ("weight", "bias")
        }
        tables = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        theirs |= {f"{table}.weight": f"{tables[table]}.weight" for table in _TABLES}
        return {name: stored for name, stored in theirs.items() if stored in self._tensors}

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
        from shadowllm.models.checkpoint import hash_files

        return hash_files([self._path])


def _unpermute(array: np.ndarray, n_heads: int) -> np.ndarray:
    # ggml interleaves the two halves of each rotated head; Hugging Face keeps them apart.
    pairs = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
