"""Compares the contents of an engine file with its record."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from shadowllm.bundle.engine_record import REMEDY, CustomNode, EngineRecord, read_sidecar
from shadowllm.bundle.gpu_images import architectures
from shadowllm.errors import UserError
from shadowllm.plugins.engine_programs import absent, carried, programs_in


def engine_contents(engine_path: Path) -> EngineRecord:
    """Read an engine's sidecar and check it against the engine's bytes; this needs no GPU.

    Raises:
        UserError: as `read_sidecar`, or the engine lacks a plugin, layer or kernel that the sidecar lists.
    """
    record = read_sidecar(engine_path)
    if missing := missing_contents(engine_path, record.plugins, record.kernels):
        raise UserError(f"{engine_path.name} does not hold {missing}, which its record lists", REMEDY)
    return record


def missing_contents(
    engine_path: Path, plugins: Iterable[CustomNode], kernels: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first plugin, layer or kernel that the engine's bytes lack."""
    names = dict.fromkeys(name for node in plugins for name in (node.op, node.name))
    with engine_path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
            return next(iter(names), None)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as engine:
            if missing := absent(engine, names):
                return missing[0]
            try:
                found = carried(programs_in(engine))
            except ValueError as error:
                return f"whole programs ({error})"
    wrong = [name for name in kernels if found.get(name) != kernels[name]]
    return f"the kernel {wrong[0]} for {architectures(kernels[wrong[0]])}" if wrong else None
