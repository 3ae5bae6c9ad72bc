"""Writes inputs for ``trtexec``, and prints the command that runs an engine of a bundle with them.

    python -m shadowllm.benchmarks.trtexec out/ --engine tensorrt_rtx --plugin-library libshadowllm_tensorrt.so

``trtexec`` fills inputs with random numbers if it is given none. A random position is outside of the cache, and a
random index outside of the weights. So every integer input is written to a file: one token at a position inside the
cache, and the first half of the units.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.bundle import selection_names as names
from shadowllm.bundle.engine_record import ShapeProfile, read_sidecar
from shadowllm.config import Flavour
from shadowllm.exporter.engines.graph import GraphInfo, describe_onnx
from shadowllm.models.sparsity import UNITS

PROGRAMS = {"tensorrt_rtx": "tensorrt_rtx", "tensorrt": "trtexec"}
DECODE = 1  # place of the profile among an engine's; the first one is for prompts


def integer_inputs(graph: GraphInfo, profile: ShapeProfile, position: int) -> dict[str, np.ndarray]:
    """Contents of all integer inputs of a decode step.

    Args:
        profile: of the decode step.
        position: of the step's token; keys and values of the tokens before it are random.
    """
    found = {}
    for tensor in graph.inputs:
        if not tensor.dtype.startswith("int"):
            continue
        shape = profile.shapes[tensor.name][2] if tensor.name in profile.shapes else tensor.shape
        sizes = tuple(int(size) for size in shape)
        found[tensor.name] = _contents(tensor.name, sizes, graph, position).astype(tensor.dtype)
    return found


def _contents(name: str, shape: tuple[int, ...], graph: GraphInfo, position: int) -> np.ndarray:
    widths = {names.indices(unit): unit for unit in UNITS}
    if name in widths:  # an index past the count is not read
        return np.broadcast_to(np.arange(shape[-1]), shape)
    for unit in UNITS:
        if name == names.counts(unit):
            width = next(t.shape[-1] for t in graph.inputs if t.name == names.indices(unit))
            return np.full(shape, int(width) // 2)
    if name == "position_ids":
        return np.full(shape, position)
    return np.ones(shape) if name == "input_ids" else np.zeros(shape)


def command(
    engine: Path,
    flavour: Flavour,
    profile: ShapeProfile,
    files: Mapping[str, Path],
    library: Path,
) -> list[str]:
    """The arguments of ``trtexec`` for a decode step at the largest shapes of its profile."""
    shapes = ",".join(f"{name}:{'x'.join(map(str, sizes[2]))}" for name, sizes in profile.shapes.items())
    return [
        PROGRAMS[flavour],
        f"--loadEngine={engine}",
        f"--dynamicPlugins={library}",
        f"--useProfile={DECODE}",
        f"--shapes={shapes}",
        f"--loadInputs={','.join(f'{name}:{path}' for name, path in files.items())}",
        "--useCudaGraph",
    ]


def write(inputs: Mapping[str, np.ndarray], folder: Path) -> dict[str, Path]:
    """Write each input as raw bytes, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.bin" for name in inputs}
    for name, array in inputs.items():
        files[name].write_bytes(np.ascontiguousarray(array).tobytes())
    return files


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("trtexec", __doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", choices=get_args(Flavour), default="tensorrt_rtx")
    parser.add_argument("--piece", default="body", help="stem, predictor, body or dense (default: body)")
    parser.add_argument("--position", type=int, default=0, help="position of the token (default: 0)")
    parser.add_argument("--plugin-library", type=Path, default=Path("build/plugin/libshadowllm_tensorrt.so"))
    parser.add_argument("--inputs", type=Path, default=Path("out/trtexec"), help="folder for the inputs")
    args = parser.parse_args(arguments)
    engine = args.bundle / "engines" / args.engine / f"{args.piece}.engine"
    profile = read_sidecar(engine).profiles[DECODE]
    graph = describe_onnx(args.bundle / f"{args.piece}.onnx")
    files = write(integer_inputs(graph, profile, args.position), args.inputs)
    print(shlex.join(command(engine, args.engine, profile, files, args.plugin_library)))


if __name__ == "__main__":
    sys.exit(main())
