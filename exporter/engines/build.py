"""Builds a TensorRT engine from an ONNX graph, in a child process.

The parser needs a loader path that is set before the process starts. The builder may crash or run out of
memory, and this must not end the caller's process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shadowllm.bundle.engine_record import CustomNode, EngineRecord, ShapeProfile, write_sidecar
from shadowllm.bundle.gpu_images import check_dependent_launch
from shadowllm.bundle.manifest import file_hash
from shadowllm.bundle.op_domain import VERSION
from shadowllm.child import Child, ChildError, call, module_command
from shadowllm.config import EngineOptions, Flavour, Verbosity
from shadowllm.errors import UserError
from shadowllm.exporter.engines.graph import GraphInfo, describe_onnx
from shadowllm.exporter.engines.inspect_engine import missing_contents
from shadowllm.exporter.engines.profiles import bindings, check_profiles, largest
from shadowllm.plugins.tensorrt.load_tensorrt import child_environment, known_targets, require, targets


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    flavour: Flavour,
    profiles: Sequence[ShapeProfile],
    sms: Sequence[int] = (),
    timing_cache: Path | None = None,
    workspace_bytes: int | None = None,
    profiling_verbosity: Verbosity = "layer_names_only",
    plugin_library: Path | None = None,
    programmatic_dependent_launch: bool = False,
    file_hashes: Mapping[str, str] | None = None,
) -> EngineRecord:
    """Build ``engine_path`` and its sidecar from an ONNX graph; each file appears only when it is complete.

    Args:
        onnx_path: the ONNX file. Its external data is in the same folder and is not copied.
        flavour: which TensorRT to use.
        profiles: the input shapes to support, from `profiles_for`. A symbol that has the same value in all
            of them becomes a fixed size of the engine.
        sms: compute capabilities to build for, as 89 for 8.9. If empty, TensorRT-RTX builds for every GPU it
            supports from Ampere on. The full TensorRT builds for the current GPU only, so it must be empty.
        timing_cache: file in which the full TensorRT keeps timings across builds. TensorRT-RTX needs none: it
            compiles kernels at run time and keeps them in its runtime cache.
        workspace_bytes: most scratch memory of one layer; None is the builder's default.
        profiling_verbosity: how much an inspector can read about the engine's layers.
        plugin_library: library of the C++ plugins to use instead of the Python ones; the engine is the same.
        programmatic_dependent_launch: let the plugins' kernels start before the one in front of them has ended.
        file_hashes: known SHA-256 hashes by file name; other source files are hashed here.

    Raises:
        UserError: the package or GPU is missing, the ONNX file or an argument is unusable, or the builder
            refuses, crashes or is killed. The message has the builder's last output.
    """
    graph = describe_onnx(onnx_path)
    bfloat16 = any(tensor.dtype == "bfloat16" for tensor in (*graph.inputs, *graph.outputs))
    options = EngineOptions(
        flavour,
        sms,
        timing_cache=timing_cache,
        plugin_library=plugin_library,
        programmatic_dependent_launch=programmatic_dependent_launch,
    )
    check_options(options, bfloat16)
    check_profiles(graph, profiles)
    files = _hash_sources(onnx_path, graph, file_hashes or {})
    engine_path.parent.mkdir(parents=True, exist_ok=True)
    part = engine_path.with_name(f".{engine_path.name}.part")
    request = request_for(
        onnx_path,
        graph,
        part,
        flavour,
        profiles,
        sms=list(sms),
        workspace_bytes=workspace_bytes,
        timing_cache=timing_cache and str(timing_cache),
        plugin_library=plugin_library and str(plugin_library.resolve()),
        programmatic_dependent_launch=programmatic_dependent_launch,
        verbosity=profiling_verbosity,
    )
    try:
        with _progress(f"{flavour}: {engine_path.name}") as show:
            built = run_worker(request, engine_path.name, show)
        record = _record(built, flavour, profiles, files)
        if missing := missing_contents(part, record.plugins, record.kernels):
            raise RuntimeError(f"the engine does not hold {missing}, which the network had")
        os.replace(part, engine_path)
        write_sidecar(engine_path, record)
    finally:
        part.unlink(missing_ok=True)
    return record


def check_options(options: EngineOptions, bfloat16: bool) -> None:
    """Refuse options that no build can follow; `build_engine` explains them.

    Args:
        bfloat16: whether the graphs compute in bfloat16.

    Raises:
        UserError: the package, the library or a GPU is missing, or an option is not for this flavour, GPU or type.
    """
    flavour, sms = options.flavour, options.sms
    require(flavour)
    if options.plugin_library is not None and not options.plugin_library.is_file():
        raise UserError(f"there is no plugin library {options.plugin_library}", "build it with `make plugin`")
    if options.timing_cache is not None and flavour == "tensorrt_rtx":
        raise UserError("TensorRT-RTX keeps no timing cache", "leave it out: its runtime cache does that work")
    if sms and flavour == "tensorrt":
        raise UserError("tensorrt builds for the GPU of this machine only", "leave out --sm, or use tensorrt_rtx")

    known = known_targets(flavour) if sms else []
    if unknown := [sm for sm in sms if sm not in known]:
        raise UserError(f"TensorRT-RTX does not build for sm_{unknown[0]}", f"it knows {', '.join(map(str, known))}")
    if 75 in sms and bfloat16:
        raise UserError("GPUs of sm_75 have no bfloat16", "export with --dtype fp16, or leave 75 out of --sm")
    if options.programmatic_dependent_launch:
        check_dependent_launch(targets(flavour, sms))


def _record(
    built: dict[str, Any], flavour: Flavour, profiles: Sequence[ShapeProfile], files: Mapping[str, str]
) -> EngineRecord:
    """The sidecar's contents, from the worker's result and the request."""
    return EngineRecord(
        flavour=flavour,
        plugin_version=VERSION,
        profiles=tuple(profiles),
        files=files,
        plugins=tuple(CustomNode(**node) for node in built.pop("plugins")),
        compute_capabilities=tuple(built.pop("compute_capabilities")),
        kernels={name: tuple(images) for name, images in built.pop("kernels").items()},
        **built,
    )


def _hash_sources(onnx_path: Path, graph: GraphInfo, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the ONNX file and its data files, by name."""
    hashes = {}
    for name in (onnx_path.name, *graph.data_files):
        path = onnx_path.parent / name
        if not path.is_file():
            raise UserError(f"{onnx_path} keeps its weights in {name}, which is missing", "export the model again")
        hashes[name] = known.get(name) or file_hash(path)
    return hashes


def request_for(
    onnx_path: Path, graph: GraphInfo, target: Path, flavour: Flavour, profiles: Sequence[ShapeProfile], **options: Any
) -> dict[str, Any]:
    """The request for the worker, in JSON types; ``target`` is the engine file to write."""
    return {
        "sms": [],
        "workspace_bytes": None,
        "timing_cache": None,
        "plugin_library": None,
        "programmatic_dependent_launch": False,
        "verbosity": "layer_names_only",
        **options,
        "onnx": str(onnx_path),
        "engine": str(target),
        "flavour": flavour,
        "bindings": bindings(graph, profiles),
        "max_batch": largest(graph, profiles, "batch"),
        "max_seqlen": largest(graph, profiles, "seqlen"),
        "max_kept": largest(graph, profiles, "kept"),
        "profiles": [asdict(profile) for profile in profiles],
    }


def run_worker(request: dict[str, Any], name: str, show: Callable[[str], None]) -> dict[str, Any]:
    """Send the request to a new child process and wait until the engine is written.

    Args:
        request: from `request_for`.
        name: name of the engine, for messages.
        show: called with the name of each phase of the build.

    Raises:
        UserError: the worker reported an error, or it was killed.
        ChildError: the worker ended with a traceback, which is a bug in this project.
    """
    command = module_command("shadowllm.exporter.engines.worker")
    try:
        with child_environment(request["flavour"]) as environment:
            return dict(call(Child(command, "the engine worker", environment=environment), request, show))
    except UserError as error:
        raise UserError(f"cannot build {name}: {error.problem}", error.remedy) from error
    except ChildError as death:
        if death.signal is None:
            raise
        last = f" (its last words: {death.said[-1]})" if death.said else ""
        raise UserError(
            f"cannot build {name}: the builder process died of {death.signal}{last}",
            "on SIGKILL, memory ran out: build with more of it, or smaller profiles",
        ) from death


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """Show the builder's phase and the time on stderr, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("[dim]{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, phase="starting")
        yield lambda phase: bar.update(task, phase=phase)
