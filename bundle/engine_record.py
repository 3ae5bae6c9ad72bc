"""The JSON record beside an engine (its sidecar), which is checked before the engine is loaded.

Deserialising an engine of another TensorRT version, GPU or plugin version fails late and without a
useful message, or does not fail at all. The sidecar allows the check beforehand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shadowllm.bundle.gpu_images import architectures, serving
from shadowllm.bundle.manifest import file_hash
from shadowllm.bundle.op_domain import VERSION
from shadowllm.errors import UserError

FORMAT = 2
REMEDY = "build the engine again: `shadowllm build`"


@dataclass(frozen=True)
class CustomNode:
    """A node of a custom op: its op, the name of its engine layer, and its decoder layer, if any."""

    op: str
    name: str
    layer: int | None


Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes of one phase.

    Attributes:
        name: the phase ("prefill", "decode").
        shapes: (smallest, best, largest) shape of each input that has a symbolic dimension.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class EngineRecord:
    """The description of an engine.

    Attributes:
        flavour: "tensorrt_rtx" or "tensorrt".
        version: TensorRT version; an engine runs only on the exact version that built it.
        compute_capabilities: of the GPUs it runs on, as 89 for 8.9.
        plugin_version: version of the custom ops' domain.
        plugins: the custom ops in the engine.
        kernels: the plugins' kernels: the compute capabilities each is compiled for, and `PTX`.
        profiles: in the order of their indices in the runtime.
        files: SHA-256 of the ONNX file and of its external data, by file name.
        engine_sha256, engine_bytes: SHA-256 and size of the engine file.
        build_seconds: time of parsing and building.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    plugin_version: int
    plugins: tuple[CustomNode, ...]
    kernels: Mapping[str, tuple[int, ...]]
    profiles: tuple[ShapeProfile, ...]
    files: Mapping[str, str]
    engine_sha256: str
    engine_bytes: int
    build_seconds: float


def sidecar_path(engine_path: Path) -> Path:
    """Return the path of an engine's sidecar: ``body.engine`` -> ``body.engine.json``."""
    return engine_path.with_name(engine_path.name + ".json")


def write_sidecar(engine_path: Path, record: EngineRecord) -> None:
    """Write the sidecar of an engine atomically."""
    part = engine_path.with_name(f".{engine_path.name}.json.part")
    part.write_text(json.dumps({"format": FORMAT} | asdict(record), indent=1) + "\n")
    os.replace(part, sidecar_path(engine_path))


def read_sidecar(engine_path: Path) -> EngineRecord:
    """Read the sidecar of an engine.

    Raises:
        UserError: engine or sidecar is missing, or the sidecar is not readable.
    """
    path = sidecar_path(engine_path)
    for file in (engine_path, path):
        if not file.is_file():
            raise UserError(f"there is no file {file}", REMEDY)
    try:
        return _record(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not readable ({error})", REMEDY) from error


def check_sidecar(
    engine_path: Path,
    flavour: str,
    version: str,
    *,
    compute_capability: int | None = None,
    files: Mapping[str, str] | None = None,
) -> EngineRecord:
    """Check from its sidecar and its bytes that an engine may be deserialised here.

    Args:
        engine_path: the engine; its sidecar is in the same folder.
        flavour, version: of the TensorRT that will run it (``trt.__version__``).
        compute_capability: of the GPU, as 89 for 8.9; None skips this check.
        files: SHA-256 by file name from the bundle's manifest; the files that the engine was built
            from must match. None skips this check.

    Raises:
        UserError: something differs; the message names it.
    """
    record, name = read_sidecar(engine_path), engine_path.name
    _same(name, "flavour", record.flavour, flavour)
    _same(name, f"{flavour} version", record.version, version)
    _same(name, "plugin version", record.plugin_version, VERSION)
    if compute_capability is not None:
        _check_gpu(name, record, compute_capability)
    for file, digest in record.files.items():
        if files is not None and files.get(file) != digest:
            raise UserError(f"{name} was built from another {file} than this bundle has", REMEDY)
    if engine_path.stat().st_size != record.engine_bytes or file_hash(engine_path) != record.engine_sha256:
        raise UserError(f"{name} is damaged: its SHA-256 is not the one in its record", REMEDY)
    return record


def _check_gpu(name: str, record: EngineRecord, sm: int) -> None:
    remedy = f"`shadowllm build --sm {sm}`"
    if sm not in record.compute_capabilities:
        raise UserError(
            f"{name} was built for {architectures(record.compute_capabilities)}, this GPU is sm_{sm}", remedy
        )
    for kernel, images in record.kernels.items():
        if serving(images, sm) is None:
            raise UserError(
                f"{name} carries {kernel} for {architectures(images)}, which does not run on this GPU, sm_{sm}", remedy
            )


def _same(name: str, what: str, built: object, here: object) -> None:
    if built != here:
        raise UserError(f"{name} was built with {what} {built}, here it is {here}", REMEDY)


def _record(data: dict[str, Any]) -> EngineRecord:
    fields = dict(data)
    if fields.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
    fields["kernels"] = {name: tuple(images) for name, images in fields["kernels"].items()}
    fields["plugins"] = tuple(CustomNode(**node) for node in fields["plugins"])
    fields["profiles"] = tuple(profile_from_json(profile) for profile in fields["profiles"])
    return EngineRecord(**fields)


def profile_from_json(data: dict[str, Any]) -> ShapeProfile:
    """Invert ``asdict`` on data from JSON, which has no tuples."""
    shapes = {name: (tuple(low), tuple(best), tuple(high)) for name, (low, best, high) in data["shapes"].items()}
    return ShapeProfile(data["name"], shapes)
