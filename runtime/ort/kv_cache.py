"""The KV cache of the sessions over ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shadowllm.models.spec import ModelSpec

# The cache grows by this many positions, so that a short text needs little memory.
CACHE_BLOCK = 256


class KVCache:
    """Keys and values of a fixed number of sequences, each in its row.

    Args:
        spec: the model.
        rows: the number of sequences.

    Attributes:
        arrays: float32 ``(rows, n_kv_heads, capacity, head_dim)`` by "layer.key" and "layer.value".
        capacity: positions of each row.
    """

    def __init__(self, spec: ModelSpec, rows: int) -> None:
        self._spec, self._rows = spec, rows
        self.capacity = 0
        self.arrays: dict[str, np.ndarray] = {}

    def reserve(self, length: int, used: Sequence[int] | np.ndarray) -> bool:
        """Grow to at least ``length`` positions; return whether it grew.

        Positions take memory only when they are written, so only those that are used are copied.

        Args:
            used: how many positions of the first rows are kept.

        Raises:
            MemoryError: there is no memory for that. The cache is then as before.
        """
        if length <= self.capacity:
            return False
        capacity = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        shape = (self._rows, self._spec.n_kv_heads, capacity, self._spec.head_dim)
        names = [f"{layer}.{part}" for layer in range(self._spec.n_layers) for part in ("key", "value")]
        grown = {name: np.zeros(shape, dtype=np.float32) for name in names}
        for name, old in self.arrays.items():
            for row, kept in enumerate(used):
                grown[name][row, :, :kept] = old[row, :, :kept]
        self.arrays, self.capacity = grown, capacity
        return True

    def buffers(self, first: int = 0, count: int | None = None) -> dict[str, np.ndarray]:
        """Inputs and outputs of graphs for some rows. Both are the same memory, so a step writes in place."""
        rows = slice(first, None if count is None else first + count)
        return {
            f"{kind}.{name}": array[rows]
            for name, array in self.arrays.items()
            for kind in ("past_key_values", "present")
        }

    def clear(self, row: int, length: int) -> None:
        """Set the first ``length`` positions of a row to zero."""
        for array in self.arrays.values():
            array[row, :, :length] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row to another row."""
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two rows."""
        for array in self.arrays.values():
            array[[one, other], :, :length] = array[[other, one], :, :length]
