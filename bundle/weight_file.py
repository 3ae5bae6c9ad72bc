"""The external-data file that all graphs of a bundle share: its layout and its writer."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shadowllm.bundle.weight_layout import Group
from shadowllm.errors import UserError

# Groups start on a page boundary, so that runtimes can map them instead of reading them.
PAGE = 4096
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Entry:
    """Place of a tensor in the file."""

    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


class WeightStore:
    """The layout of the data file, and a streaming writer for it.

    Args:
        path: the data file.
        groups: runs of (name, shape, dtype) that are stored back to back.
    """

    def __init__(self, path: Path, groups: Iterator[Group]) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        end = 0
        for group in groups:
            end = -(-end // PAGE) * PAGE
            for name, shape, dtype in group:
                length = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
                self.entries[name] = Entry(end, length, dtype, shape)
                end += length
        self.size = end

    def write(self, tensors: Mapping[str, torch.Tensor], progress: Callable[[int], None] = lambda _: None) -> str:
        """Write all tensors in order, one in memory at a time; return the file's SHA-256.

        Raises:
            UserError: a number does not fit its dtype in the file.
        """
        digest = hashlib.sha256()
        with self.path.open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            for name, entry in self.entries.items():
                put(bytes(entry.offset - file.tell()))
                for block in _blocks(name, tensors[name], TORCH_DTYPES[entry.dtype]):
                    put(block)
                progress(entry.length)
        return digest.hexdigest()


class MappedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a data file, mapped into memory, not read.

    A tensor's pages are read when it is used. All pages are given back to the system after some tensors were asked
    for, and a tensor that is used again is read again. So a pass over a model needs the memory of a few matrices.
    ``dict`` of this keeps the pages.
    """

    KEPT = 1 << 26  # bytes of tensors that are asked for until pages are given back

    def __init__(self, store: WeightStore) -> None:
        self._entries, self._asked = store.entries, 0
        with store.path.open("rb") as file:  # PyTorch asks for writable memory
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._data = np.frombuffer(self._map, dtype=np.uint8)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        self._asked += entry.length
        if self._asked > self.KEPT and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)
            self._asked = entry.length
        data = torch.from_numpy(self._data[entry.offset : entry.offset + entry.length])
        return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _blocks(name: str, tensor: torch.Tensor, dtype: torch.dtype, elements: int = 1 << 22) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in ``dtype``, converted a few million elements at a time."""
    rows = max(1, elements // max(1, math.prod(tensor.shape[1:])))
    for part in tensor.split(rows):
        converted = part.to(dtype).contiguous()
        # The extremes are not finite if any element is NaN or infinite. This needs only one pass.
        if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
            raise _unfit(name, part, dtype)
        yield memoryview(converted.view(torch.uint8).reshape(-1).numpy())


def _unfit(name: str, part: torch.Tensor, dtype: torch.dtype) -> UserError:
    if not part.isfinite().all():
        return UserError(f"tensor {name} holds NaN or infinity", "the checkpoint or the predictor is damaged")
    kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return UserError(
        f"tensor {name} holds the number {float(part.abs().max()):g}, and {kind} ends at {largest:g}",
        "export with --dtype bf16 or fp32",
    )
