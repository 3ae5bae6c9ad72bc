"""The child process that builds one engine; it reports the name of each phase as progress."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shadowllm.bundle.engine_record import CustomNode, profile_from_json
from shadowllm.bundle.gpu_images import with_fallback
from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.child import Progress, serve
from shadowllm.errors import UserError
from shadowllm.exporter.engines.graph import Compiler, TensorInfo, prepare
from shadowllm.plugins.engine_programs import carried
from shadowllm.plugins.kernel_program import Program
from shadowllm.plugins.ops.nested_gather.schema import NESTED_GATHER
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from shadowllm.plugins.registry import SCHEMAS
from shadowllm.plugins.schema import Attributes, copy_of
from shadowllm.plugins.tensorrt import creators, load_tensorrt


def build(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Parse, build and write one engine; request and result are those of `build.run_worker`.

    Raises:
        UserError: the parser or the builder refuses; the message has its reason.
    """
    trt = load_tensorrt.load(request["flavour"])
    logger = _logger_class(trt)()
    keep = _register(trt, request["plugin_library"])  # noqa: F841  # the registry does not keep the plugins alive
    start = time.perf_counter()
    progress("compiling kernels")
    targets = load_tensorrt.targets(request["flavour"], request["sms"])
    prepared = prepare(Path(request["onnx"]), request["bindings"], compiler(request, targets))
    progress("parsing")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, prepared.model, request["onnx"])
    _check_plugins(trt, network, prepared.programs)
    engine = _build(trt, builder, network, logger, request, progress)
    seconds = time.perf_counter() - start
    progress("writing")
    Path(request["engine"]).write_bytes(engine)
    return {
        "version": trt.__version__,
        "compute_capabilities": targets,
        "plugins": [asdict(node) for node in prepared.programs],
        "kernels": carried(prepared.programs.values()),
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        "engine_bytes": engine.nbytes,
        "build_seconds": round(seconds, 3),
    }


def compiler(request: dict[str, Any], sms: Sequence[int]) -> Compiler:
    """Make the function that compiles the kernels of a node for the engine's GPUs.

    Raises:
        UserError: Triton is not installed.
    """
    try:
        from shadowllm.plugins.triton.compile import Tensor, compile_program
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UserError(
            "the package triton, which compiles the kernels, is not installed", "pip install triton"
        ) from error

    images = with_fallback(sms)

    def compile_node(op: str, inputs: Mapping[str, TensorInfo], attributes: Attributes) -> Program:
        tensors = {name: Tensor(port.dtype, port.shape) for name, port in as_kernels_read(inputs).items()}
        return compile_program(
            op,
            tensors,
            attributes,
            max_batch=most_rows(op, request),
            max_seqlen=request["max_seqlen"],
            sms=images,
            programmatic_dependent_launch=request["programmatic_dependent_launch"],
        )

    return compile_node


def most_rows(op: str, request: dict[str, Any]) -> int:
    """The largest size that the first dimension of a node's first input has in a call."""
    kept, seqlen = request["max_kept"], request["max_seqlen"]
    of_sequence = {SHORTLIST_LOGITS.name: kept, NESTED_LINEAR.name: max(kept, seqlen), NESTED_GATHER.name: seqlen}
    return int(request["max_batch"] * of_sequence.get(op, 1))


def as_kernels_read(inputs: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The inputs of a node as its kernels read them: residuals of 2 bits are 16-bit words, one for each of the copy.

    TensorRT has no such type, so the engine has them as int32.
    """
    found = dict(inputs)
    for name, port in inputs.items():
        copy = inputs.get(copy_of(name))
        if copy is not None and port.dtype == copy.dtype and port.shape != copy.shape:
            found[name] = replace(port, dtype="int16", shape=copy.shape)
    return found


def _register(trt: Any, library: str | None) -> Any:
    """Register the Python plugins, or those of a library, with TensorRT."""
    if library is None:
        return creators.register(trt)
    registry = trt.get_plugin_registry()
    handle = registry.load_library(library)
    if any(registry.get_creator(op, str(VERSION), DOMAIN) is None for op in SCHEMAS):
        raise UserError(f"{library} does not hold the plugins of this version", "build it with `make plugin`")
    return handle


def _parse(trt: Any, network: Any, logger: Any, model: bytes, path: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model, path=path):  # the parser finds external data relative to this path
        return
    reasons = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        # A line with catchCudaError only reports that there is no GPU.
        words = [line for line in error.desc().splitlines() if "catchCudaError" not in line]
        reasons.append(f"{error.node_operator()} {error.node_name()}: {' '.join(words)}")
    raise UserError(
        f"the ONNX parser refuses {Path(path).name}: {'; '.join(reasons) or logger.last_error}",
        "export the model again with this version; if that does not help, this is a bug",
    )


def _check_plugins(trt: Any, network: Any, nodes: Collection[CustomNode]) -> None:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = {layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3}
    if plugins != {node.name for node in nodes}:
        raise RuntimeError(f"the network's plugin layers are {sorted(plugins)}, the graph's are {nodes}")


def _build(trt: Any, builder: Any, network: Any, logger: Any, request: dict[str, Any], progress: Progress) -> Any:
    """The serialised engine, as host memory."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    profiles = [Profile() for _ in request["profiles"]]
    for profile, data in zip(profiles, request["profiles"], strict=True):
        for name, shapes in profile_from_json(data).shapes.items():
            profile.add(name, *shapes)
    verbosity = getattr(trt.ProfilingVerbosity, request["verbosity"].upper())
    monitor = _monitor_class(trt)(progress)
    options: dict[str, Any] = {"profiles": profiles, "profiling_verbosity": verbosity, "progress_monitor": monitor}
    if request["workspace_bytes"] is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request["workspace_bytes"]}
    if request["flavour"] == "tensorrt_rtx":
        chosen = [divmod(sm, 10) for sm in sorted(set(request["sms"]))] or None
        config = CreateConfigRTX(compute_capabilities=chosen, **options)
    else:
        config = CreateConfig(load_timing_cache=request["timing_cache"], **options)
    made = config(builder, network)
    made.max_aux_streams = 0  # all work of a step is on the stream that is captured
    if request["flavour"] == "tensorrt_rtx":
        # Without this, a context may allocate memory in a step, which a stream under capture must not do.
        made.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            return EngineBytesFromNetwork((builder, network), made, save_timing_cache=request["timing_cache"])()
    except PolygraphyException as error:
        remedy = "try other sizes or another --sm; if neither helps, report it with this message"
        raise UserError(f"TensorRT refuses: {logger.last_error or error}", remedy) from error


def _logger_class(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Prints warnings and errors to stderr and keeps the last error."""

        def __init__(self) -> None:
            super().__init__()
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and "catchCudaError" not in message:
                self.last_error = message
            if severity <= trt.ILogger.WARNING:
                print(message, file=sys.stderr, flush=True)

    return Logger


def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the two outer levels of build phases."""

        def __init__(self, progress: Progress) -> None:
            super().__init__()
            self.progress = progress
            self.outer: set[str | None] = {None}

        def phase_start(self, name: str, parent_phase: str | None, _steps: int) -> None:
            if parent_phase in self.outer:
                self.progress(name.lower())
            if parent_phase is None:
                self.outer.add(name)

        def phase_finish(self, _name: str) -> None:
            pass

        def step_complete(self, _name: str, _step: int) -> bool:
            return True

    return Monitor


if __name__ == "__main__":
    sys.exit(serve(build))
