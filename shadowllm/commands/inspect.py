"""``shadowllm inspect``"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.errors import UserError

if TYPE_CHECKING:
    from shadowllm.exporter.engine_graph import CustomNode

EPILOG = """examples:
  shadowllm inspect out/                                        # a bundle: sizes, budgets, validation, engines
  shadowllm inspect out/body.onnx                               # a graph, and what a build would need
  shadowllm inspect out/engines/tensorrt_rtx/body.engine        # plugins per layer, targets, profiles
  shadowllm inspect predictor.safetensors --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="bundle, .onnx, .engine or predictor .safetensors")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Describe whatever lies at the path."""
    if not args.path.exists():
        raise UserError(f"{args.path} does not exist", "give a bundle, an .onnx file, an .engine file or a predictor")
    kind = "bundle" if args.path.is_dir() else args.path.suffix
    describe = {"bundle": bundle, ".onnx": onnx, ".engine": engine, ".safetensors": predictor}.get(kind)
    if describe is None:
        raise UserError(
            f"{args.path} is of no kind that can be inspected",
            "give a bundle, an .onnx file, an .engine file or a predictor",
        )
    found = describe(args.path)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(args.path, found)


def show(path: Path) -> None:
    """Print a bundle."""
    _print(path, bundle(path))


def show_engines(path: Path) -> None:
    """Print the engines of a bundle alone."""
    _print(path, {"engines": bundle(path)["engines"]})


def bundle(path: Path) -> dict[str, Any]:
    """A bundle after checking all of its files."""
    from shadowllm.exporter.manifest import read_manifest, verify_files

    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    engines = {f"{file.parent.name}/{file.name}": engine(file) for file in sorted(path.glob("engines/*/*.engine"))}
    return {
        "model": manifest.model,
        "dtype": manifest.dtype,
        "spec": manifest.spec.to_dict(),
        "parameters": manifest.spec.n_parameters,
        "dense_layers": manifest.dense_layers,
        "budgets": manifest.budgets,
        "predictor": manifest.predictor,
        "validation": manifest.validation or "skipped",
        "tools": manifest.tools,
        "files": {name: f"{(path / name).stat().st_size / 1e6:.2f} MB" for name in manifest.files},
        "engines": engines,
    }


def onnx(path: Path) -> dict[str, Any]:
    """An ONNX file, and what a build of it would need."""
    from shadowllm.exporter.engine_graph import describe_onnx

    info = describe_onnx(path)
    return {
        "graph": info.name,
        "opset": info.opset,
        "weights": f"{info.weight_bytes / 1e6:.2f} MB",
        "data_files": list(info.data_files),
        "inputs": {t.name: f"{t.dtype} {list(t.shape)}" for t in info.inputs},
        "outputs": {t.name: f"{t.dtype} {list(t.shape)}" for t in info.outputs},
        "plugins": _by_layer(info.custom_ops),
        "ops": info.ops,
    }


def engine(path: Path) -> dict[str, Any]:
    """An engine, by its sidecar and its own bytes; needs neither TensorRT nor a GPU."""
    from shadowllm.exporter.sidecar import engine_contents

    record = engine_contents(path)
    return {
        "flavour": record.flavour,
        "version": record.version,
        "size": f"{record.engine_bytes / 1e6:.2f} MB",
        "build_seconds": round(record.build_seconds, 1),
        "compute_capabilities": list(record.compute_capabilities),
        "profiles": [asdict(profile) for profile in record.profiles],
        "plugins": _by_layer(record.plugins),
        "plugin_counts": dict(Counter(node.op for node in record.plugins)),
    }


def predictor(path: Path) -> dict[str, Any]:
    """A predictor file."""
    from shadowllm.predictor.artefact import Predictor

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


def _print(path: Path, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.tree import Tree

    def grow(branch: Tree, value: Any) -> None:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            simple = not isinstance(part, dict | list) or (
                isinstance(part, list) and not any(isinstance(p, dict | list) for p in part)
            )
            if simple or not part:
                shown = ", ".join(map(str, part)) if isinstance(part, list | dict) else part
                branch.add(f"{key}: {shown if shown != '' else '-'}", highlight=False)
            else:
                grow(branch.add(f"{key}"), part)

    tree = Tree(str(path), highlight=False)
    grow(tree, found)
    Console(soft_wrap=True, markup=False).print(tree)
