"""Which GPUs the kernels of programs are compiled for, and which image a GPU runs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from mmap import mmap

from shadowllm.plugins.program import MAGIC, PTX, PTX_SM, Program


def serving(images: Iterable[int], sm: int) -> int | None:
    """Which image a GPU runs.

    Its own; else the newest before it of the same major version, as cubins are made to be compatible,
    except that from 9.0 on compilers make them for one GPU alone; else PTX.

    Args:
        images: compute capabilities there are images for, as 89 for 8.9, and `PTX`.
        sm: of the GPU.

    Returns:
        One of them, or None where none will do.
    """
    there = set(images)
    if sm in there:
        return sm
    older = [image for image in there if image != PTX and image // 10 == sm // 10 and image < sm < 90]
    if older:
        return max(older)
    return PTX if PTX in there and sm >= PTX_SM else None


def carried(programs: Iterable[Program]) -> dict[str, tuple[int, ...]]:
    """Kernels by name, each with the GPUs that all of its variants have images for."""
    found: dict[str, set[int]] = {}
    for program in programs:
        for kernel in program.kernels:
            images = {image.sm for image in kernel.images}
            found[kernel.name] = found.get(kernel.name, images) & images
    return {name: tuple(sorted(images)) for name, images in sorted(found.items())}


def programs_in(data: bytes | mmap) -> Iterator[Program]:
    """All programs in an engine's bytes, where they stand as they were packed.

    Raises:
        ValueError: one is damaged.
    """
    start = struct.pack("<q", len(MAGIC)) + MAGIC
    place = data.find(start)
    while place >= 0:
        program, end = Program.read(data, place)
        yield program
        place = data.find(start, end)
