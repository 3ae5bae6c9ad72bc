"""One TensorRT engine as a part of a decode step."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.bundle.engine_record import REMEDY
from shadowllm.errors import UserError
from shadowllm.plugins.tensorrt import creators
from shadowllm.runtime.gpu.engine_buffers import PHASES, Buffer, Phase, buffer_of, shape_of
from shadowllm.runtime.gpu.kernel_cache import KernelCache

# A library of the plugins to run engines with, instead of those in Python.
PLUGINS_VARIABLE = "SHADOWLLM_TENSORRT_PLUGINS"
TRT_DTYPES = {"int64": "INT64", "int32": "INT32", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class TrtEngine:
    """One engine: its weights once, and an execution context for each phase.

    Args:
        trt: the TensorRT module.
        path: of the engine.
        logger: from `logger_class`.
        kernels: where TensorRT-RTX keeps what it compiles.
    """

    def __init__(self, trt: Any, runtime: Any, path: Path, logger: Any, stream: int, kernels: Path) -> None:
        self._name, self._logger = path.name, logger
        self._engine = runtime.deserialize_cuda_engine(np.memmap(path, dtype=np.uint8, mode="r"))
        if self._engine is None:
            raise UserError(f"TensorRT does not deserialise {path.name}: {logger.last_error}", REMEDY)
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
        self._contexts: dict[Phase, Any] = {}
        # The full TensorRT compiles when it builds.
        self._kernels = KernelCache(engine.create_runtime_config(), kernels) if hasattr(trt, "IRuntimeCache") else None
        for index, phase in enumerate(PHASES):
            context = self._need(self._context(trt, eager=phase == "decode"), "a context")
            self._need(context.set_optimization_profile_async(index, stream), f"the {phase} profile")
            self._contexts[phase] = context
        self.workspace = engine.device_memory_size_v2

    def close(self) -> None:
        """Keep what was compiled, and let go of the contexts, which must not outlive it."""
        if self._kernels:
            self._kernels.save()
        self._contexts.clear()

    def bind(self, found: Mapping[str, Buffer], addresses: Mapping[str, int], scratch: int) -> None:
        """Give every tensor of both phases its address.

        Raises:
            UserError: the engine has other tensors than this version's.
        """
        for phase, context in self._contexts.items():
            context.set_device_memory(scratch, self.workspace)
            for tensor, dtype in self._dtypes.items():
                name = buffer_of(tensor, phase)
                if name not in found or TRT_DTYPES[found[name].dtype] != dtype:
                    raise UserError(f"{self._name} has a tensor {tensor} of {dtype}, which is not known here", REMEDY)
                self._need(context.set_tensor_address(tensor, addresses[name]), f"the address of {tensor}")

    def shape(self, phase: Phase, found: Mapping[str, Buffer], seqlen: int) -> None:
        """Set the shapes of a phase's inputs, for steps over ``seqlen`` tokens."""
        for tensor in self._inputs:
            shape = shape_of(found[buffer_of(tensor, phase)], seqlen)
            self._need(self._contexts[phase].set_input_shape(tensor, shape), f"the shape {shape} of {tensor}")

    def check_capturable(self, stream: int) -> None:
        """Make sure that a decode step can be captured, where TensorRT says so beforehand."""
        context = self._contexts["decode"]
        if hasattr(context, "is_stream_capturable"):
            self._need(context.is_stream_capturable(stream), "being captured")

    def run(self, phase: Phase, stream: int) -> None:
        """Ask for one run; does not wait."""
        self._need(self._contexts[phase].execute_async_v3(stream), f"the {phase} step")

    def _context(self, trt: Any, eager: bool) -> Any:
        """A context whose scratch memory is ours to give.

        Args:
            eager: have TensorRT-RTX compile for the shapes at hand at once, and not behind a running step, which
                could then not be captured.
        """
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            return self._engine.create_execution_context(user_managed)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        if eager:
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._need(self._kernels.serve(config), "a cache of its kernels")
        return self._engine.create_execution_context(config)

    def _need(self, answer: Any, what: str) -> Any:
        if not answer:
            raise RuntimeError(f"{self._name}: TensorRT refuses {what}: {self._logger.last_error}")
        return answer


@cache
def load_plugins(trt: Any) -> Any:
    """Make the plugins known to TensorRT, once a process: those in Python, or a library of them.

    Raises:
        UserError: the library cannot be loaded.
    """
    library = os.environ.get(PLUGINS_VARIABLE)
    if not library:
        return creators.register(trt)
    remedy = f"correct or unset {PLUGINS_VARIABLE}"
    if not Path(library).is_file():
        raise UserError(f"there is no plugin library {library}", remedy)
    try:
        return trt.get_plugin_registry().load_library(library)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"TensorRT cannot load {library} ({error})", remedy) from error


def logger_class(trt: Any) -> Any:
    """An ``ILogger`` of the TensorRT module ``trt`` with the ``last_error``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Passes errors on to stderr and remembers the last one."""

        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = message
                print(message, file=sys.stderr, flush=True)

    return Logger
