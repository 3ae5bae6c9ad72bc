"""Integer weights of a bundle: quantised at export, and dequantised for the reference decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.certificate import best_weighting, copy_errors
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, dequantise, quantise, rounded
from shadowllm.bundle.weight_names import (
    base,
    copy_source,
    integers,
    is_copy,
    is_copy_errors,
    is_copy_weighting,
    is_down_norms,
    is_integers,
    is_quantised,
    is_scales,
    is_transposed,
    low_bit_copy,
    rows_are_inputs,
    scales,
    scales_beside,
    transposed,
)
from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import tensor_shape


def check_quantisable(spec: ModelSpec, dtype: str, q: Quantisation) -> None:
    """Refuse models that cannot have integer weights.

    Raises:
        UserError: the activations are 16-bit, or rows are not whole blocks.
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
    """Tensors of another mapping, plus each matrix and its transpose as integers and scales.

    `weight_names` defines the names. Each access makes the tensor. Read the integers first: their
    scales are then kept until they are read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], q: Quantisation) -> None:
        self._tensors, self._q = tensors, q
        self._scales: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if is_scales(name):
            return self._scales.pop(name) if name in self._scales else self._make(name)[1]
        if not is_integers(name):
            return self._tensors[name]
        data, self._scales[scales_beside(name)] = self._make(name)
        return data

    def _make(self, name: str) -> tuple[Tensor, Tensor]:
        tensor = self._tensors[base(name)]
        matrix = (tensor.T if is_transposed(name) else tensor).float().contiguous().cpu().numpy()
        data, found = quantise(matrix, self._q)
        return torch.from_numpy(data), torch.from_numpy(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class RoundedTensors(Mapping[str, Tensor]):
    """Canonical tensors in float32, rounded on access like the weights of a bundle's sparse layers."""

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
    """The tensors of a low-bit copy, named as in `copy_groups`, made on access from a model's weights.

    Args:
        final_squares: mean squares of the inputs of the output table, ``(hidden_size,)``. They decide how many rows a
            certificate recomputes. None estimates them from the weights of the final norm.
    """

    def __init__(self, weights: Mapping[str, Tensor], final_squares: Tensor | None = None) -> None:
        self._weights, self._matrices = weights, QuantisedTensors(weights, LOW_BIT_COPY)
        self._final_squares = final_squares
        self._weighting: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> Tensor:
        if not is_copy(name):
            raise KeyError(name)
        source = copy_source(name)
        if is_down_norms(name):
            return row_norms(self._weights[source])
        if is_copy_weighting(name):
            return torch.from_numpy(self._weighting_of(source))
        return self._errors(source) if is_copy_errors(name) else self._matrices[source]

    def _errors(self, table: str) -> Tensor:
        rows = self._weights[table].numpy()
        copy, factors = quantise(rows, LOW_BIT_COPY)
        return torch.from_numpy(copy_errors(rows, copy, factors, self._weighting_of(table)))

    def _weighting_of(self, table: str) -> np.ndarray:
        """The weighting of the table's errors."""
        if table not in self._weighting:
            squares = (
                self._estimated_squares() if self._final_squares is None else self._final_squares.numpy(force=True)
            )
            self._weighting[table] = best_weighting(squares, mean_square_errors(self._weights[table]))
        return self._weighting[table]

    def _estimated_squares(self) -> np.ndarray:
        """The final norm tells how large each element of its output is."""
        squares = np.square(self._weights["final_norm.weight"].numpy())
        if "final_norm.bias" in self._weights:
            squares = squares + np.square(self._weights["final_norm.bias"].numpy())
        return squares

    def __iter__(self) -> Iterator[str]:
        return map(low_bit_copy, self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def dequantised_weights(
    spec: ModelSpec, names: Iterable[str], tensors: Mapping[str, Tensor], q: Quantisation
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return canonical float32 weights as in the sparse graph, and as in the dense graphs.

    They differ in ``o_proj`` and ``down_proj``. The sparse graph rounds these along neurons or head
    dimensions, the dense graphs along the inputs.

    Args:
        names: canonical names of all weights.
        tensors: floats, integers and scales by the names that `QuantisedTensors` gives them.
    """

    def restore(name: str, width: int) -> np.ndarray:
        return dequantise(tensors[integers(name)].numpy(), tensors[scales(name)].numpy(), width, q)

    sparse: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name in names:
        if not is_quantised(name):
            sparse[name] = dense[name] = tensors[name].float()
            continue
        rows, width = tensor_shape(spec, name)
        sparse[name] = dense[name] = torch.from_numpy(restore(name, width))
        if rows_are_inputs(name):
            dense[name] = torch.from_numpy(restore(transposed(name), rows).T.copy())
    return sparse, dense


def dequantised_predictor(predictor: Predictor, q: Quantisation) -> Predictor:
    """Return the predictor as in the graph: its network's matrices are rounded to integers and back."""

    def restore(tensor: Tensor) -> Tensor:
        data, found = quantise(tensor.numpy(), q)
        return torch.from_numpy(dequantise(data, found, tensor.shape[1], q).copy())

    matrices = [name for name in predictor.learned if name.endswith(".weight")]
    return replace(predictor, tensors=predictor.tensors | {name: restore(predictor.tensors[name]) for name in matrices})


def row_norms(down_proj: Tensor) -> Tensor:
    """Return ``||w_down[f]||`` of each neuron, float32 ``(intermediate_size,)``."""
    return down_proj.float().norm(dim=-1)


def mean_square_errors(table: Tensor) -> np.ndarray:
    """Return the mean square of a matrix minus its low-bit copy over the rows, float64 ``(width,)``."""
    total = np.zeros(table.shape[1])
    for part in table.split(1 << 12):  # temporaries are several times as large as the rows
        rows = part.float().numpy()
        total += np.square(rows - rounded(rows, LOW_BIT_COPY), dtype=np.float64).sum(axis=0)
    return total / len(table)
