"""Finds names and programs in an engine's bytes, and the GPUs that their kernels are compiled for.

An engine has all weights of the model. So its bytes are read in parts, and those of a mapped file are given back.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator

from shadowllm.plugins.kernel_program import Program
from shadowllm.plugins.kernel_program_bytes import MAGIC, read

PART = 1 << 24  # bytes


def carried(programs: Iterable[Program]) -> dict[str, tuple[int, ...]]:
    """For each kernel name, the GPUs that all of its variants have images for."""
    found: dict[str, set[int]] = {}
    for program in programs:
        for kernel in program.kernels:
            images = {image.sm for image in kernel.images}
            found[kernel.name] = found.get(kernel.name, images) & images
    return {name: tuple(sorted(images)) for name, images in sorted(found.items())}


def absent(data: bytes | mmap.mmap, names: Iterable[str]) -> list[str]:
    """The names that are not in an engine's bytes, which have all of them as plain text."""
    wanted = {name: name.encode() for name in names}
    for start, stop in _parts(data, max(map(len, wanted.values()), default=0)):
        wanted = {name: text for name, text in wanted.items() if data.find(text, start, stop) < 0}
    return list(wanted)


def programs_in(data: bytes | mmap.mmap) -> Iterator[Program]:
    """All programs in an engine's bytes, which holds them exactly as they were packed.

    Raises:
        ValueError: a program is damaged.
    """
    pattern, end = struct.pack("<q", len(MAGIC)) + MAGIC, 0
    for start, stop in _parts(data, len(pattern)):
        place = data.find(pattern, max(start, end), stop)
        while place >= 0:
            program, end = read(data, place)
            yield program
            place = data.find(pattern, end, stop)


def _parts(data: bytes | mmap.mmap, overlap: int) -> Iterator[tuple[int, int]]:
    """Start and end of parts that overlap by so many bytes."""
    for start in range(0, len(data), PART):
        yield start, min(len(data), start + PART + overlap)
        if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            data.madvise(mmap.MADV_DONTNEED)
