"""One TensorRT engine of a session."""

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

# Path of a plugin library to use instead of the Python plugins.
PLUGINS_VARIABLE = "SHADOWLLM_TENSORRT_PLUGINS"
TRT_DTYPES = {"int64": "INT64", "int32": "INT32", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class TrtEngine:
    """One engine with an execution context for each phase; both contexts share the weights.

    Args:
        trt: the TensorRT module.
        path: the engine file.
        logger: from `logger_class`.
        kernels: file in which the kernels that TensorRT-RTX compiles are kept.
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
        self._check_caches()
        self._contexts: dict[Phase, Any] = {}
        # The full TensorRT has no runtime cache, because it compiles kernels at build time.
        self._kernels = KernelCache(engine.create_runtime_config(), kernels) if hasattr(trt, "IRuntimeCache") else None
        for index, phase in enumerate(PHASES):
            context = self._need(self._context(trt, eager=phase == "decode"), "a context")
            self._need(context.set_optimization_profile_async(index, stream), f"the {phase} profile")
            self._contexts[phase] = context
        self.workspace = engine.device_memory_size_v2

    def close(self) -> None:
        """Save the compiled kernels and free the contexts, which must not outlive the engine."""
        if self._kernels:
            self._kernels.save()
        self._contexts.clear()

    def bind(self, found: Mapping[str, Buffer], addresses: Mapping[str, int], scratch: int) -> None:
        """Set the address of every tensor in both phases.

        Raises:
            UserError: the engine has a tensor that this version does not know.
        """
        for phase, context in self._contexts.items():
            context.set_device_memory(scratch, self.workspace)
            for tensor, dtype in self._dtypes.items():
                name = buffer_of(tensor, phase)
                if name not in found or TRT_DTYPES[found[name].dtype] != dtype:
                    raise UserError(f"{self._name} has a tensor {tensor} of {dtype}, which is not known here", REMEDY)
                self._need(context.set_tensor_address(tensor, addresses[name]), f"the address of {tensor}")

    def shape(self, phase: Phase, found: Mapping[str, Buffer], seqlen: int, kept: int = 1) -> None:
        """Set the input shapes of a phase for steps over ``seqlen`` tokens that return the logits after ``kept``."""
        for tensor in self._inputs:
            shape = shape_of(found[buffer_of(tensor, phase)], seqlen, kept)
            self._need(self._contexts[phase].set_input_shape(tensor, shape), f"the shape {shape} of {tensor}")

    def capturable(self, stream: int) -> bool:
        """Whether a decode step can be captured. A TensorRT without a function that says so captures every step."""
        context = self._contexts["decode"]
        return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream))

    def run(self, phase: Phase, stream: int) -> None:
        """Launch one run; does not wait."""
        self._need(self._contexts[phase].execute_async_v3(stream), f"the {phase} step")

    def _check_caches(self) -> None:
        """Check that the engine writes each cache in place, because input and output have one address.

        Raises:
            UserError: the output is another tensor for TensorRT.
        """
        for output in sorted(self._dtypes.keys() - self._inputs):
            same = [name for name in self._inputs if buffer_of(name, "decode") == buffer_of(output, "decode")]
            if same and self._engine.get_aliased_input_tensor(output) not in same:
                raise UserError(f"{self._name} does not update {same[0]} in place", REMEDY)

    def _context(self, trt: Any, eager: bool) -> Any:
        """Make a context that uses scratch memory from the session.

        Args:
            eager: whether TensorRT-RTX compiles for the current shapes at once. Otherwise it compiles in the
                background of a running step, and this step cannot be captured.
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
    """Register the Python plugins or a plugin library with TensorRT, once per process.

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
    """Make an ``ILogger`` class of the TensorRT module ``trt`` that keeps the ``last_error``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Prints errors to stderr and keeps the last one."""

        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = message
                print(message, file=sys.stderr, flush=True)

    return Logger
