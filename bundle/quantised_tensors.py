"""Integer weights of a bundle: quantised at export, and dequantised for the reference decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.certificate import best_weighting, copy_errors
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import (
    LOW_BIT_COPY,
    Quantisation,
    dequantise,
    dequantise_nested,
    quantise,
    quantise_nested,
    quantised_copy,
    rounded,
    rounded_copy,
)
from shadowllm.bundle.weight_names import (
    base,
    copy_source,
    integers,
    is_copy,
    is_copy_errors,
    is_copy_weighting,
    is_down_norms,
    is_part,
    is_quantised,
    is_transposed,
    low_bit_copy,
    matrix,
    residual,
    rows_are_inputs,
    scales,
    transposed,
)
from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import tensor_shape


def check_quantisable(spec: ModelSpec, dtype: str, q: Quantisation) -> None:
    """Refuse models that cannot have integer weights.

    Raises:
        UserError: the activations are 16-bit, or rows are not whole blocks. (Rows of nested integers are padded.)
    """
    if dtype != "float32":
        raise UserError(f"integer weights go with float32 activations, not {dtype}", "leave out --dtype")
    if q.residual_bits:
        return
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
    """Tensors of another mapping, plus each matrix and its transpose as integers and scales, or as nested integers.

    `weight_names` defines the names. The first access to a part of a matrix makes all of its parts. The others are kept
    until they are read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], q: Quantisation) -> None:
        self._tensors, self._q = tensors, q
        self._parts: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if not is_part(name):
            return self._tensors[name]
        if name not in self._parts:
            self._parts |= {part: torch.from_numpy(array) for part, array in self._make(name).items()}
        return self._parts.pop(name)

    def _make(self, name: str) -> dict[str, np.ndarray]:
        tensor, whole = self._tensors[base(name)], matrix(name)
        values = (tensor.T if is_transposed(name) else tensor).float().contiguous().cpu().numpy()
        if not self._q.residual_bits:
            return dict(zip((integers(whole), scales(whole)), quantise(values, self._q), strict=True))
        copy = low_bit_copy(whole)
        names = (integers(copy), scales(copy), residual(whole))
        return dict(zip(names, quantise_nested(values, self._q), strict=True))

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
        weights: canonical float32 tensors, rounded as in the bundle.
        q: format of the weights; None if they are floats. The copy of nested integers is a part of them, and so it is
            not among these tensors.
        final_squares: mean squares of the inputs of the output table, ``(hidden_size,)``. They decide how many rows a
            certificate recomputes. None estimates them from the weights of the final norm.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], q: Quantisation | None = None, final_squares: Tensor | None = None
    ) -> None:
        self._weights, self._q, self._matrices = weights, q, QuantisedTensors(weights, LOW_BIT_COPY)
        self._final_squares = final_squares
        self._weighting: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> Tensor:
        nested = self._q is not None and self._q.residual_bits > 0
        if not is_copy(name) or (nested and is_part(name)):
            raise KeyError(name)
        source = copy_source(name)
        if is_down_norms(name):
            return row_norms(self._weights[source])
        if is_copy_weighting(name):
            return torch.from_numpy(self._weighting_of(source))
        return self._errors(source) if is_copy_errors(name) else self._matrices[source]

    def _errors(self, table: str) -> Tensor:
        rows = self._weights[table].numpy()
        copy, factors = quantised_copy(rows, self._q)
        return torch.from_numpy(copy_errors(rows, copy, factors, self._weighting_of(table)))

    def _weighting_of(self, table: str) -> np.ndarray:
        """The weighting of the table's errors."""
        if table not in self._weighting:
            squares = (
                self._estimated_squares() if self._final_squares is None else self._final_squares.numpy(force=True)
            )
            self._weighting[table] = best_weighting(squares, mean_square_errors(self._weights[table], self._q))
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
        if not q.residual_bits:
            return dequantise(tensors[integers(name)].numpy(), tensors[scales(name)].numpy(), width, q)
        copy = low_bit_copy(name)
        high, steps, low = (tensors[part].numpy() for part in (integers(copy), scales(copy), residual(name)))
        return dequantise_nested(high, steps, low, width, q)

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
    matrices = [name for name in predictor.learned if name.endswith(".weight")]
    found = {name: torch.from_numpy(rounded(predictor.tensors[name].numpy(), q).copy()) for name in matrices}
    return replace(predictor, tensors=predictor.tensors | found)


def row_norms(down_proj: Tensor) -> Tensor:
    """Return ``||w_down[f]||`` of each neuron, float32 ``(intermediate_size,)``."""
    return down_proj.float().norm(dim=-1)


def mean_square_errors(table: Tensor, q: Quantisation | None = None) -> np.ndarray:
    """Return the mean square of a matrix minus its low-bit copy over the rows, float64 ``(width,)``.

    Args:
        q: format of the matrix, see `quantisation.rounded_copy`.
    """
    total = np.zeros(table.shape[1])
    for part in table.split(1 << 12):  # temporaries are several times as large as the rows
        rows = part.float().numpy()
        total += np.square(rows - rounded_copy(rows, q), dtype=np.float64).sum(axis=0)
    return total / len(table)
