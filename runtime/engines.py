"""The door to TensorRT engines: everything is checked before one would be deserialised."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NoReturn

from shadowllm.errors import UserError
from shadowllm.exporter.manifest import read_manifest
from shadowllm.exporter.sidecar import check_sidecar
from shadowllm.plugins.tensorrt.flavour import gpu_capability, load


def open_engines(bundle: Path, flavour: Literal["tensorrt_rtx", "tensorrt"]) -> NoReturn:
    """Check the engines of a bundle, and say what keeps them from running.

    Raises:
        UserError: always: no bundle or engines, the package or a GPU is missing, an engine is of
            another version, GPU or bundle, or, where all of that is right, that the plugins carry
            no kernels in this version.
    """
    manifest = read_manifest(bundle)
    folder = bundle / "engines" / flavour
    if not folder.is_dir():
        raise UserError(f"{bundle} has no {flavour} engines", f"shadowllm build {bundle} --engine {flavour}")
    version = load(flavour).__version__
    for piece in manifest.sparse_pieces:
        check_sidecar(
            folder / f"{piece}.engine", flavour, version, compute_capability=gpu_capability(), files=manifest.files
        )
    raise UserError(
        f"{flavour} engines of this version carry their plugins without kernels, so they cannot run",
        "inspect them with `shadowllm inspect`, and run the bundle with --backend ort",
    )
