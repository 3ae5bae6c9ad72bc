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
    Matrix,
    Quantisation,
    dequantise,
    dequantise_nested,
    quantise,
    quantise_nested,
    quantised_copy,
    rounded,
    rounded_copy,
    slices,
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

# A remedy. Integers with a low-bit copy have padded rows, and kernels for GPUs.
INSTEAD_OF_PLAIN_INTEGERS = (
    "export without --weight-dtype, or with int8 or int6 and --rest shadow (not with the selector relu)"
)


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
                INSTEAD_OF_PLAIN_INTEGERS,
            )


class FloatRows:
    """The rows of a tensor in float32, converted a slice at a time. This is a `quantisation.Matrix`.

    An output table can be larger than all other weights of a small model together. So it is never converted as a whole.

    Args:
        tensor: floats of any type, on any device; at least one dimension.
        dtype: floats are first rounded to this type.
        q: matrices are first rounded to these integers instead.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype = torch.float32, q: Quantisation | None = None) -> None:
        self._tensor, self._dtype, self._q = tensor, dtype, q
        self.shape = tuple(tensor.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice, /) -> np.ndarray:
        rows = self._tensor[part]
        if self._q:
            return rounded(rows.float().numpy(force=True), self._q)
        return rows.to(self._dtype).float().numpy(force=True)


class QuantisedTensors(Mapping[str, Tensor]):
    """Tensors of another mapping, plus each matrix and its transpose as integers and scales, or as nested integers.

    `weight_names` defines the names. The first access to a part of a matrix makes all of its parts. The others are kept
    until they are read.

    Args:
        tensors: floats by canonical name.
        q: the integers.
        dtype, stored: how a bundle stores floats and matrices. Their values are first rounded to that.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        q: Quantisation,
        dtype: torch.dtype = torch.float32,
        stored: Quantisation | None = None,
    ) -> None:
        self._tensors, self._q, self._dtype, self._stored = tensors, q, dtype, stored
        self._parts: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if not is_part(name):
            return self._tensors[name]
        if name not in self._parts:
            self._parts |= {part: torch.from_numpy(array) for part, array in self._make(name).items()}
        return self._parts.pop(name)

    def rows(self, name: str, transpose: bool = False) -> FloatRows:
        """Return the rows of a tensor, or of its transpose, rounded as in the bundle."""
        tensor = self._tensors[name]
        stored = self._stored if is_quantised(name) else None
        return FloatRows(tensor.T if transpose else tensor, self._dtype, stored)

    def _make(self, name: str) -> dict[str, np.ndarray]:
        rows, whole = self.rows(base(name), is_transposed(name)), matrix(name)
        if not self._q.residual_bits:
            return dict(zip((integers(whole), scales(whole)), quantise(rows, self._q), strict=True))
        copy = low_bit_copy(whole)
        names = (integers(copy), scales(copy), residual(whole))
        return dict(zip(names, quantise_nested(rows, self._q), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Copies(QuantisedTensors):
    """The low-bit copy of each matrix, under the names of integers and scales."""

    def _make(self, name: str) -> dict[str, np.ndarray]:
        rows, whole = self.rows(base(name), is_transposed(name)), matrix(name)
        return dict(zip((integers(whole), scales(whole)), quantised_copy(rows, self._stored), strict=True))


class CopyTensors(Mapping[str, Tensor]):
    """The tensors of a low-bit copy, named as in `copy_groups`, made on access from a model's weights.

    Args:
        weights: canonical float tensors.
        q: format of the bundle's weights; None if they are floats. The copy of nested integers is a part of them, and
            so it is not among these tensors.
        final_squares: mean squares of the inputs of the output table, ``(hidden_size,)``. They decide how many rows a
            certificate recomputes. None estimates them from the weights of the final norm.
        dtype: type of the bundle's floats.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        q: Quantisation | None = None,
        final_squares: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._weights, self._q, self._matrices = weights, q, _Copies(weights, LOW_BIT_COPY, dtype, q)
        self._final_squares = final_squares
        self._weighting: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> Tensor:
        nested = self._q is not None and self._q.residual_bits > 0
        if not is_copy(name) or (nested and is_part(name)):
            raise KeyError(name)
        source = copy_source(name)
        if is_down_norms(name):
            rows = self._matrices.rows(source)
            return torch.cat([row_norms(torch.from_numpy(rows[part])) for part in slices(rows)])
        if is_copy_weighting(name):
            return torch.from_numpy(self._weighting_of(source))
        return self._errors(source) if is_copy_errors(name) else self._matrices[source]

    def _errors(self, table: str) -> Tensor:
        weighting = self._weighting_of(table)  # first, because it reads the table too
        rows = self._matrices.rows(table)
        copy, factors = quantised_copy(rows, self._q)
        return torch.from_numpy(copy_errors(rows, copy, factors, weighting))

    def _weighting_of(self, table: str) -> np.ndarray:
        """The weighting of the table's errors."""
        if table not in self._weighting:
            squares = (
                self._estimated_squares() if self._final_squares is None else self._final_squares.numpy(force=True)
            )
            self._weighting[table] = best_weighting(squares, mean_square_errors(self._matrices.rows(table), self._q))
        return self._weighting[table]

    def _estimated_squares(self) -> np.ndarray:
        """The final norm tells how large each element of its output is."""
        names = [name for name in ("final_norm.weight", "final_norm.bias") if name in self._weights]
        return sum(np.square(self._matrices.rows(name)[:]) for name in names)

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


def dequantised_copy(data: Tensor, scales: Tensor, width: int) -> Tensor:
    """Values of a low-bit copy, float32 ``(rows, width)``, as `quantisation.dequantise` computes them.

    PyTorch does it with several threads: whoever evaluates text reads each matrix many times.

    Args:
        data: uint8 ``(rows, bytes)``, two elements per byte, the first one in the lower half.
        scales: float32 ``(rows, blocks)``.
    """
    values = torch.empty(len(data), width)
    for part in slices(data.numpy()):  # temporaries of a whole output table would be larger than the table
        elements = torch.stack((data[part] & 15, data[part] >> 4), dim=-1).view(*scales[part].shape, -1)
        values[part] = elements.float().sub_(8).mul_(scales[part, :, None]).flatten(1)[:, :width]
    return values


def row_norms(down_proj: Tensor) -> Tensor:
    """Return ``||w_down[f]||`` of each neuron, float32 ``(intermediate_size,)``."""
    return down_proj.float().norm(dim=-1)


def mean_square_errors(table: Matrix, q: Quantisation | None = None) -> np.ndarray:
    """Return the mean square of a matrix minus its low-bit copy over the rows, float64 ``(width,)``.

    Args:
        table: float32.
        q: format of the matrix, see `quantisation.rounded_copy`.
    """
    total = np.zeros(table.shape[1])
    for start in range(0, len(table), 1 << 12):  # temporaries are several times as large as the rows
        rows = table[start : start + (1 << 12)]
        total += np.square(rows - rounded_copy(rows, q), dtype=np.float64).sum(axis=0)
    return total / len(table)
