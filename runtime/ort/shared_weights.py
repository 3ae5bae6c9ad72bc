"""Maps a bundle's weights once for all graphs of a session."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

# Smaller tensors stay with the graph, because ONNX Runtime folds them into other constants.
LEAST_BYTES = 4096


class SharedWeights:
    """The data file of a bundle, mapped into memory, from which graphs take their initializers.

    Without this, ONNX Runtime would map or copy the file for each graph. The object must live as long as the graphs.

    Args:
        path: the data file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # ONNX Runtime asks for writable memory
        self._data = np.frombuffer(self._map, dtype=np.uint8)
        self._values: list[ort.OrtValue] = []  # ONNX Runtime does not own them

    def give(self, graph: ir.Graph, options: ort.SessionOptions) -> None:
        """Make a session with these options read the graph's external initializers from the mapped file."""
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or (tensor.length or 0) < LEAST_BYTES:
                continue
            start = tensor.offset or 0
            flat = self._data[start : start + int(tensor.length or 0)]
            shared = _ort_value(flat, tensor)
            options.add_initializer(value.name, shared)
            self._values.append(shared)

    def release(self) -> None:
        """Give the memory of pages that were read back to the system; a page that is used again is mapped again.

        Native ops pack integer rows when their graph is loaded, and then never read these pages again.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)


def _ort_value(data: np.ndarray, tensor: ir.ExternalTensor) -> ort.OrtValue:
    """A value over the memory of ``data``, with type and shape of the tensor."""
    array = data.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.BFLOAT16:  # NumPy has no such type
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(tensor.dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)
