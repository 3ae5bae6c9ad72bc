"""Runs all measurements of ShadowLLM on a machine with a GPU.

    python -m shadowllm.benchmarks.gpu --json gpu.json
    python -m shadowllm.benchmarks.gpu --quick --only checks rates
    TRITON_INTERPRET=1 python -m shadowllm.benchmarks.gpu --tiny      # the same code on a CPU, without times

Sections: ``tensorrt`` (whether TensorRT runs engines on this card), ``checks`` (every kernel compared with its
reference), ``programs`` (programs packed ahead of time, through the launchers of both plugins: results, and times with
and without programmatic dependent launch), ``rates`` (GB/s compared with the card's copy bandwidth), ``decode``
(random models of known shapes, sparse compared with PyTorch dense, both as CUDA graphs), ``engines`` (the same with
TensorRT and ONNX Runtime, if they run). ``engines`` writes models to the temporary folder, and needs a full
installation of ShadowLLM. ``programs`` needs ``--programs``.

If a section fails, its error is recorded and the others go on; the exit status is then 1. ``checks``, ``rates``
and ``decode`` need only PyTorch, Triton, NumPy, transformers and safetensors; ``programs`` needs cuda-bindings too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shadowllm.benchmarks.gpu.probe import probe
from shadowllm.benchmarks.random_model import GPU_SHAPES, TINY_SHAPES
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.environment import PACKAGES, environment, package_versions
from shadowllm.plugins.tensorrt.load_tensorrt import FLAVOURS
from shadowllm.runtime.gpu.cuda_graph import kernel_device

SECTIONS = ("tensorrt", "checks", "programs", "rates", "decode", "engines")


def gpu_environment(device: torch.device) -> dict[str, Any]:
    """`environment`, plus the card: name, compute capability, memory and driver."""
    packages = (*PACKAGES, "triton", "cuda-bindings")
    found = environment() | {"packages": package_versions(packages), "device": str(device)}
    if device.type == "cpu":
        return found | {"gpu": None}
    card = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.memory,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        driver = f"unknown ({error})"
    return found | {
        "gpu": card.name,
        "sm": 10 * card.major + card.minor,
        "gpu_memory_gb": round(card.total_memory / 1e9, 1),
        "multiprocessors": card.multi_processor_count,
        "driver, memory clock, power limit": driver,
        "cuda": torch.version.cuda,
    }


class Recorder:
    """Runs parts of the benchmark, and records the result or the error of each."""

    def __init__(self, path: Path | None, record: dict[str, Any]) -> None:
        self._path, self.record, self.failed = path, record, list[str]()

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run one part and record it; a failure is recorded too, and does not stop the others."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found = work()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # any failure of one part must not lose the rest
            found = {"error": "".join(traceback.format_exception_only(error)).strip(), "trace": traceback.format_exc()}
        if isinstance(found, dict) and ("error" in found or found.get("passed") is False):
            self.failed.append(name)
        self.record["results"][name] = found
        self.record["failed"] = self.failed
        _free()
        if self._path:
            self._path.write_text(json.dumps(self.record, indent=1) + "\n")


def _probe(flavour: str) -> dict[str, Any]:
    """Probe a flavour; a refusal is a result, not a failure."""
    return {"probe": probe(flavour)}


def _free() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(recorder: Recorder, sections: Sequence[str], device: torch.device, args: argparse.Namespace) -> None:
    """Run the sections in order."""
    from shadowllm.benchmarks.gpu import cases, checks, decode, rates

    setting = decode.TINY if args.tiny else decode.QUICK if args.quick else decode.Setting()
    shapes = args.shapes or list(TINY_SHAPES if args.tiny else GPU_SHAPES)
    if "tensorrt" in sections:
        for flavour in FLAVOURS:
            recorder.run(f"tensorrt: {flavour}", partial(_probe, flavour))
    if "checks" in sections:
        chosen = cases.TINY if args.tiny else cases.CASES
        recorder.run("checks", lambda: checks.summary(list(checks.check_all(device, chosen))))
    if "programs" in sections and args.programs is not None:
        from shadowllm.benchmarks.gpu.programs import check_programs

        recorder.run("programs", partial(check_programs, device, args.programs, args.launcher_library))
    if "rates" in sections:
        sizes = rates.TINY if args.tiny else rates.OPT_67B
        recorder.run("rates", lambda: rates.measure_rates(device, sizes))
    if "decode" in sections:
        for shape in shapes:
            recorder.run(f"decode: {shape}", partial(decode.measure_shape, shape, device, setting))
    if "engines" in sections and not args.tiny:
        from shadowllm.benchmarks.gpu import engines

        for shape in shapes:
            recorder.run(f"engines: {shape}", partial(engines.measure_shape, shape, setting))


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("gpu", __doc__)
    add_json(parser, "write everything there, after each part")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help="run these")
    parser.add_argument("--shapes", nargs="+", choices=(*GPU_SHAPES, *TINY_SHAPES), help="models (default: all large)")
    parser.add_argument("--quick", action="store_true", help="fewer runs and tokens")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for the interpreter")
    parser.add_argument("--programs", type=Path, metavar="FOLDER", help="from benchmarks.gpu.programs")
    parser.add_argument("--launcher-library", type=Path, metavar="FILE", help="the C++ launcher, from `make plugin`")
    args = parser.parse_args(arguments)
    device = kernel_device()
    if args.programs is not None and device.type == "cpu":
        raise UserError("programs run on a GPU only", "leave out --programs, or run this on a machine with a GPU")
    if device.type == "cpu" and not args.tiny:
        raise UserError("the interpreter is too slow for anything but --tiny", "run this on a machine with a GPU")
    recorder = Recorder(args.json, {"environment": gpu_environment(device), "results": {}, "failed": []})
    measure(recorder, args.only, device, args)
    if not args.json:
        print(json.dumps(recorder.record, indent=1))
    if recorder.failed:
        raise UserError(f"failed: {', '.join(recorder.failed)}", "the record has the errors")


if __name__ == "__main__":
    sys.exit(main())
