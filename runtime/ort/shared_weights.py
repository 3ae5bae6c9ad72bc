"""Maps a bundle's weights once for all graphs of a session."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from shadowllm.errors import BundleGoneError, temporary_files
from shadowllm.progress import progress

# Smaller tensors stay with the graph, because ONNX Runtime folds them into other constants.
LEAST_BYTES = 4096
ALIGNMENT = 64  # of computed initializers, in bytes


class SharedWeights:
    """The data file of a bundle, mapped into memory, from which graphs take their initializers.

    Without this, ONNX Runtime would map or copy the file for each graph. The object must live as long as the graphs.

    Args:
        path: the data file.
    """

    def __init__(self, path: Path) -> None:
        self._maps: list[mmap.mmap] = []
        self._path, self._file = path, path.open("rb")
        weakref.finalize(self, self._file.close)
        self._data = self._map(self._file)
        self._values: list[ort.OrtValue] = []  # ONNX Runtime does not own them
        self._computed: dict[str, np.ndarray] = {}

    @property
    def path(self) -> Path:
        """Where the data file is now. On Linux it may be in a folder that was renamed meanwhile.

        Raises:
            BundleGoneError: it is not there any more, or another file is in its place.
        """
        link = Path(f"/proc/self/fd/{self._file.fileno()}")
        path = link.readlink() if link.is_symlink() else self._path
        if not (path.is_file() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))):
            raise BundleGoneError
        return path

    def give(self, graphs: Iterable[ir.Graph], options: ort.SessionOptions) -> None:
        """Make a session with these options read the graphs' external initializers from the mapped file."""
        for name, value in {name: value for graph in graphs for name, value in graph.initializers.items()}.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or (tensor.length or 0) < LEAST_BYTES:
                continue
            start = tensor.offset or 0
            flat = self._data[start : start + int(tensor.length or 0)]
            array = flat.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
            self._add(name, array, tensor.dtype, options)

    def give_computed(self, weights: Mapping[str, Callable[[], np.ndarray]], options: ort.SessionOptions) -> None:
        """Make a session with these options read initializers that are computed now, one after the other.

        They are written to a file without a name. So `release` can give back their memory, and what a session still
        reads comes from the file. Those that another graph has under the same name are not computed again.

        Raises:
            UserError: the folder of temporary files has too little space.
        """
        self._compute({name: compute for name, compute in weights.items() if name not in self._computed})
        for name in weights:
            self._add(name, self._computed[name], ir.DataType.from_numpy(self._computed[name].dtype), options)

    def _compute(self, weights: Mapping[str, Callable[[], np.ndarray]]) -> None:
        arrays = {}
        with temporary_files(), TemporaryFile() as file, progress("Computing weights", len(weights)) as advance:
            for name, compute in weights.items():
                array = compute()
                advance(1)
                arrays[name] = array.dtype, array.shape, file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                file.write(array.data)
            file.flush()
            data = self._map(file) if arrays else np.empty(0, dtype=np.uint8)
        for name, (dtype, shape, start) in arrays.items():
            self._computed[name] = np.ndarray(shape, dtype, data, start)

    def release(self) -> None:
        """Give the memory of pages that were read back to the system; a page that is used again is read again.

        Sparse native ops and ONNX Runtime pack integer rows when a graph is loaded, and never read these pages again.
        ``NestedLinear`` reads its weights there.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for one in self._maps:
                one.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: IO[bytes]) -> np.ndarray:
        self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))  # ONNX Runtime asks for writable memory
        return np.frombuffer(self._maps[-1], dtype=np.uint8)

    def _add(self, name: str, array: np.ndarray, dtype: ir.DataType, options: ort.SessionOptions) -> None:
        if dtype == ir.DataType.BFLOAT16:  # NumPy has no such type
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(dtype))
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        options.add_initializer(name, value)
        self._values.append(value)
