"""Describe a file or bundle as plain JSON types, for ``shadowllm inspect``."""

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
    """Return the kind of a path ("bundle", "onnx", "engine", "predictor") and its description.

    Raises:
        UserError: the path does not exist, is of another kind, or is damaged.
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
    """Describe a bundle, after checking all of its files."""
    from shadowllm.bundle.manifest import read_manifest, verify_files

    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    files = sorted(path.glob("engines/[!.]*/*.engine"))  # hidden folders are those of builds that have not ended
    engines = {f"{file.parent.name}/{file.name}": engine(file) for file in files}
    return {
        "model": manifest.model,
        "dtype": manifest.dtype,
        "parameters": manifest.spec.n_parameters,
        "spec": manifest.spec.to_dict(),
        "dense_layers": manifest.dense_layers,
        "budgets": manifest.budgets,
        "rest": manifest.rest,
        "allocation": manifest.allocation,
        "drafting": manifest.drafting,
        "dense": manifest.dense,
        "predictor": manifest.predictor,
        "validation": manifest.validation,
        "base_fingerprint": manifest.base_fingerprint,
        "adapter_fingerprint": manifest.adapter_fingerprint,
        "tools": manifest.tools,
        "files": {name: (path / name).stat().st_size for name in manifest.files},
        "engines": engines,
    }


def onnx(path: Path) -> dict[str, Any]:
    """Describe an ONNX file, and the needs of an engine build."""
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
    """Describe an engine from its sidecar and its bytes, without TensorRT or a GPU."""
    from shadowllm.exporter.engines.inspect_engine import engine_contents

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
    """Describe a predictor file."""
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
    """Return the op names per decoder layer. Ops of the predictor serve all layers."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault("all layers" if node.layer is None else f"layer {node.layer}", []).append(node.op)
    return found
