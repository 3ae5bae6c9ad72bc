"""Finds the programs in an engine's bytes, and the GPUs that their kernels are compiled for."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from mmap import mmap

from shadowllm.plugins.kernel_program import Program
from shadowllm.plugins.kernel_program_bytes import MAGIC, read


def carried(programs: Iterable[Program]) -> dict[str, tuple[int, ...]]:
    """For each kernel name, the GPUs that all of its variants have images for."""
    found: dict[str, set[int]] = {}
    for program in programs:
        for kernel in program.kernels:
            images = {image.sm for image in kernel.images}
            found[kernel.name] = found.get(kernel.name, images) & images
    return {name: tuple(sorted(images)) for name, images in sorted(found.items())}


def programs_in(data: bytes | mmap) -> Iterator[Program]:
    """All programs in an engine's bytes, which holds them exactly as they were packed.

    Raises:
        ValueError: a program is damaged.
    """
    start = struct.pack("<q", len(MAGIC)) + MAGIC
    place = data.find(start)
    while place >= 0:
        program, end = read(data, place)
        yield program
        place = data.find(start, end)
