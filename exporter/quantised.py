"""Integer weights of a bundle: made from a checkpoint when it is written, turned back for the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models import ModelSpec
from shadowllm.models.weights import tensor_shape
from shadowllm.plugins.quantisation import Quantisation, dequantise, quantise, rounded
from shadowllm.predictor.artefact import Predictor
from shadowllm.predictor.weight_copy import COPY, lengths


def check_quantisable(spec: ModelSpec, dtype: str, q: Quantisation) -> None:
    """Refuse what has no integer form.

    Raises:
        UserError: 16-bit activations, or rows that are not whole blocks.
    """
    if dtype != "float32":
        raise UserError(f"integer weights go with float32 activations, not {dtype}", "leave out --dtype")
    sizes = {
        "hidden size": spec.hidden_size,
        "intermediate size": spec.intermediate_size,
        "attention width": spec.n_heads * spec.head_dim,
    }
    for name, size in sizes.items():
        if size % q.block:
            raise UserError(
                f"the {name} {size} is no multiple of {q.block}, the block of int{q.bits} weights",
                "leave out --weight-dtype",
            )


class QuantisedTensors(Mapping[str, Tensor]):
    """Tensors of another mapping, and for each matrix ``X``: ``X.q`` and ``X.scales``, and of its transpose ``X.T.q``.

    Each is made when asked for. Ask for the integers first: the scales are kept from then until
    they are asked for.
    """

    def __init__(self, tensors: Mapping[str, Tensor], q: Quantisation) -> None:
        self._tensors, self._q = tensors, q
        self._scales: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        matrix, _, part = name.rpartition(".")
        if part == "scales":
            return self._scales.pop(matrix) if matrix in self._scales else self._make(matrix)[1]
        if part != "q":
            return self._tensors[name]
        data, self._scales[matrix] = self._make(matrix)
        return data

    def _make(self, name: str) -> tuple[Tensor, Tensor]:
        tensor = self._tensors[name.removesuffix(".T")]
        matrix = (tensor.T if name.endswith(".T") else tensor).float().contiguous().cpu().numpy()
        data, scales = quantise(matrix, self._q)
        return torch.from_numpy(data), torch.from_numpy(scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class RoundedTensors(Mapping[str, Tensor]):
    """Canonical tensors in float32, each rounded, when asked for, as a bundle's sparse layers have it."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype, q: Quantisation | None) -> None:
        self._weights, self._dtype, self._q = weights, dtype, q

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        if self._q and is_quantised(name):
            return torch.from_numpy(rounded(tensor.float().numpy(), self._q))
        return tensor.to(self._dtype).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class CopyTensors(Mapping[str, Tensor]):
    """A quantised shadow by the names that `copy_groups` gives it, made of a model's weights when asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self._matrices = weights, QuantisedTensors(weights, COPY)

    def __getitem__(self, name: str) -> Tensor:
        if not name.startswith("copy."):
            raise KeyError(name)
        name = name.removeprefix("copy.")
        if name.endswith(".lengths"):
            return lengths(self._weights[name.replace("lengths", "down_proj.weight")])
        return self._matrices[name]

    def __iter__(self) -> Iterator[str]:
        return (f"copy.{name}" for name in self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def dequantised_weights(
    spec: ModelSpec, names: Iterable[str], tensors: Mapping[str, Tensor], q: Quantisation
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Canonical float32 weights as the sparse graph and as the dense graphs have them.

    The two differ in what lies by input channel (``o_proj``, ``down_proj``), which is rounded along
    neurons for the one and along the inputs for the other.

    Args:
        names: canonical names of all weights.
        tensors: floats, integers and scales by the names that `QuantisedTensors` gives them.
    """

    def restore(name: str, width: int) -> np.ndarray:
        return dequantise(tensors[f"{name}.q"].numpy(), tensors[f"{name}.scales"].numpy(), width, q)

    sparse: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name in names:
        if not is_quantised(name):
            sparse[name] = dense[name] = tensors[name].float()
            continue
        rows, width = tensor_shape(spec, name)
        sparse[name] = dense[name] = torch.from_numpy(restore(name, width))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            dense[name] = torch.from_numpy(restore(f"{name}.T", rows).T.copy())
    return sparse, dense


def dequantised_predictor(predictor: Predictor, q: Quantisation) -> Predictor:
    """The predictor as the graph has it: a network's matrices rounded to integers and back, the rest as it is."""

    def restore(tensor: Tensor) -> Tensor:
        data, scales = quantise(tensor.numpy(), q)
        return torch.from_numpy(dequantise(data, scales, tensor.shape[1], q).copy())

    matrices = [name for name in predictor.learned if name.endswith(".weight")]
    return replace(predictor, tensors=predictor.tensors | {name: restore(predictor.tensors[name]) for name in matrices})


def is_quantised(name: str) -> bool:
    """Whether a canonical weight is one of the matrices; norms, biases and position embeddings stay floats."""
    return name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
