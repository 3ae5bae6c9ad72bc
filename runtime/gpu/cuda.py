"""The CUDA calls of a TensorRT session, all on one stream."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from shadowllm.errors import UserError


class CudaError(RuntimeError):
    """A CUDA call failed; the message names it."""


class Cuda:
    """Device memory, copies and CUDA graphs on the current GPU.

    Addresses are integers, as TensorRT takes them. Copies from or to the host that do not wait need host memory from
    `pinned`.

    Raises:
        UserError: no GPU, no driver or an old one, or no ``cuda-bindings``.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
            raise UserError("the package cuda-bindings is not installed", "pip install cuda-bindings")
        from cuda.bindings import runtime

        self._api = runtime
        error, count = runtime.cudaGetDeviceCount()
        if error == runtime.cudaError_t.cudaErrorInsufficientDriver:
            raise self._driver_error()
        if error != runtime.cudaError_t.cudaSuccess or not count:
            raise UserError(
                f"engines need an NVIDIA GPU, and CUDA finds none here ({error.name})",
                "run the bundle with --backend ort",
            )
        self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        self._held: list[tuple[str, Any]] = []

    def _driver_error(self) -> UserError:
        """The error for a missing driver or one that is too old."""
        remedy = "or run the bundle with --backend ort"
        # 12090 means 12.9, and 0 means that there is no driver.
        known, needed = (ask()[1] for ask in (self._api.cudaDriverGetVersion, self._api.cudaRuntimeGetVersion))
        if not known:
            return UserError(
                "engines need an NVIDIA GPU and its driver, and no driver is installed here",
                f"install the NVIDIA driver, {remedy}",
            )
        old, new = (f"{version // 1000}.{version % 1000 // 10}" for version in (known, needed))
        return UserError(
            f"the NVIDIA driver knows CUDA up to {old}, and cuda-bindings needs {new}",
            f"update the NVIDIA driver, {remedy}",
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime API and return its result.

        Raises:
            UserError: out of memory.
            CudaError: any other error.
        """
        error, *found = getattr(self._api, name)(*arguments)
        codes = self._api.cudaError_t
        if error == codes.cudaErrorMemoryAllocation:
            raise UserError(
                f"{name}: the GPU's memory is not enough", "build the engines with a smaller --capacity or --max-batch"
            )
        if error != codes.cudaSuccess:
            raise CudaError(f"{name} failed: {error.name}: {self._api.cudaGetErrorString(error)[1].decode()}")
        return found[0] if found else None

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes of zeros on the device and return their address."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._held.append(("cudaFree", address))
        self.clear(address, size)
        return address

    def clear(self, address: int, size: int) -> None:
        """Set bytes on the device to zero, after all earlier work; does not wait."""
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Allocate an array of zeros in pinned host memory, for copies that do not wait."""
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        address = int(self._call("cudaMallocHost", size))
        self._held.append(("cudaFreeHost", address))
        array = np.frombuffer(memoryview((ctypes.c_byte * size).from_address(address)), dtype=dtype)
        array[:] = 0
        return array.reshape(shape)

    def write(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device and wait until it is copied."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        self.wait()

    def read(self, array: np.ndarray, address: int) -> None:
        """Copy from the device to a contiguous pinned array, after all earlier work; does not wait."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device, after all earlier work; does not wait."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", target, source, size, getattr(self._api.cudaMemcpyKind, kind), self.stream)

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def event(self) -> Any:
        """Make a CUDA event for `record` and `wait_for`."""
        event = self._call("cudaEventCreateWithFlags", self._api.cudaEventDisableTiming)
        self._held.append(("cudaEventDestroy", event))
        return event

    def record(self, event: Any) -> None:
        """Record the event after all work on the stream so far."""
        self._call("cudaEventRecord", event, self.stream)

    def wait_for(self, event: Any) -> None:
        """Wait until all work before the event is done."""
        self._call("cudaEventSynchronize", event)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture ``work``, which must not wait, as one CUDA graph; calling the result launches the graph."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with no_garbage_collection():
            self._call("cudaStreamBeginCapture", self.stream, mode)
            try:
                work()
            except BaseException:
                self._api.cudaStreamEndCapture(self.stream)  # its error is ignored, the first one is raised
                raise
            graph = self._call("cudaStreamEndCapture", self.stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._held.append(("cudaGraphExecDestroy", executable))
        return lambda: self._call("cudaGraphLaunch", executable, self.stream)

    def release(self) -> None:
        """Wait for all work, then free all memory, events and graphs; the stream stays."""
        self.wait()
        while self._held:
            name, what = self._held.pop()
            self._call(name, what)

    def close(self) -> None:
        """Free everything, with the stream."""
        self.release()
        self._call("cudaStreamDestroy", self.stream)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect Python's garbage now, and none inside the block.

    An object that frees device memory during a capture would break the CUDA graph.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
