"""The base of graph passes that make new weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass


class ComputesWeights(InPlacePass):
    """A graph pass whose new weights are initializers without data. A session is given the data when it is loaded.

    Attributes:
        weights: a function for each new initializer, by name, that computes its data.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Callable[[], np.ndarray]] = {}

    def initializer(
        self,
        graph: ir.Graph,
        name: str,
        stored: ir.ExternalTensor,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        compute: Callable[[], np.ndarray],
    ) -> ir.Value:
        """A new initializer, or the one that already has this name.

        Args:
            stored: a tensor of the weight file. ONNX Runtime wants a file for the new one too, and does not read it.
        """
        if name not in self.weights:
            tensor = ir.ExternalTensor(
                stored.location, None, None, dtype, shape=ir.Shape(shape), name=name, base_dir=stored.base_dir
            )
            graph.register_initializer(ir.val(name, const_value=tensor))
            self.weights[name] = compute
        return graph.initializers[name]


def taken(tensor: ir.ExternalTensor) -> np.ndarray:
    """A copy of the data of a tensor, ``(rows, elements)``, so that the file need not stay in memory."""
    data: np.ndarray = tensor.numpy().reshape(tensor.shape.numpy()[0], -1).copy()
    tensor.release()
    return data
