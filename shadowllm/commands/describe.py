"""What lies at a path, as plain JSON types: the matter of ``shadowllm inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.errors import UserError

if TYPE_CHECKING:
    from shadowllm.bundle.engine_record import CustomNode


def describe(path: Path) -> tuple[str, dict[str, Any]]:
    """Kind of the thing ("bundle", "onnx", "engine", "predictor") and its description.

    Raises:
        UserError: nothing there, of no such kind, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", "give a bundle, an .onnx file, an .engine file or a predictor")
    kinds = {".onnx": ("onnx", onnx), ".engine": ("engine", engine), ".safetensors": ("predictor", predictor)}
    name, function = ("bundle", bundle) if path.is_dir() else kinds.get(path.suffix, ("", None))
    if function is None:
        raise UserError(
            f"{path} is of no kind that can be inspected",
            "give a bundle, an .onnx file, an .engine file or a predictor",
        )
    return name, function(path)


def bundle(path: Path) -> dict[str, Any]:
    """A bundle after checking all of its files."""
    from shadowllm.bundle.manifest import read_manifest, verify_files

    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    engines = {f"{file.parent.name}/{file.name}": engine(file) for file in sorted(path.glob("engines/*/*.engine"))}
    return {
        "model": manifest.model,
        "dtype": manifest.dtype,
        "parameters": manifest.spec.n_parameters,
        "spec": manifest.spec.to_dict(),
        "dense_layers": manifest.dense_layers,
        "budgets": manifest.budgets,
        "allocation": manifest.allocation,
        "dense": manifest.dense,
        "predictor": manifest.predictor,
        "validation": manifest.validation,
        "tools": manifest.tools,
        "files": {name: (path / name).stat().st_size for name in manifest.files},
        "engines": engines,
    }


def onnx(path: Path) -> dict[str, Any]:
    """An ONNX file, and what a build of it would need."""
    from shadowllm.exporter.engines.graph import describe_onnx

    info = describe_onnx(path)
    return {
        "graph": info.name,
        "opset": info.opset,
        "weight_bytes": info.weight_bytes,
        "data_files": list(info.data_files),
        "inputs": {tensor.name: [tensor.dtype, *tensor.shape] for tensor in info.inputs},
        "outputs": {tensor.name: [tensor.dtype, *tensor.shape] for tensor in info.outputs},
        "plugins": _by_layer(info.custom_ops),
        "ops": info.ops,
    }


def engine(path: Path) -> dict[str, Any]:
    """An engine, by its sidecar and its own bytes; needs neither TensorRT nor a GPU."""
    from shadowllm.exporter.engines.contents import engine_contents

    record = engine_contents(path)
    return {
        "flavour": record.flavour,
        "version": record.version,
        "bytes": record.engine_bytes,
        "build_seconds": round(record.build_seconds, 1),
        "compute_capabilities": list(record.compute_capabilities),
        "plugins": _by_layer(record.plugins),
        "kernels": {name: list(images) for name, images in record.kernels.items()},
        "plugin_counts": dict(Counter(node.op for node in record.plugins)),
        "profiles": [asdict(profile) for profile in record.profiles],
    }


def predictor(path: Path) -> dict[str, Any]:
    """A predictor file."""
    from shadowllm.bundle.predictor_file import Predictor

    found = Predictor.load(path)
    return {
        "kind": found.kind,
        "rank": found.rank,
        "n_sparse": found.n_sparse,
        "dense_layers": found.dense_layers,
        "parameters": sum(tensor.numel() for tensor in found.tensors.values()),
        "base_fingerprint": found.base_fingerprint,
        "record": found.record,
    }


def _by_layer(nodes: Iterable[CustomNode]) -> dict[str, list[str]]:
    """Op names per decoder layer; those of the predictor serve all layers."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault("all layers" if node.layer is None else f"layer {node.layer}", []).append(node.op)
    return found
