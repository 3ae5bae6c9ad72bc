"""Runs a program through the CUDA driver; ``cpp/launcher.cpp`` does the same in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from cuda.bindings import driver

from shadowllm.bundle.gpu_images import NEW_FORMAT_DRIVER, NEW_FORMAT_SM, PTX, serving
from shadowllm.plugins.kernel_program import ALIGNED, Argument, Image, Kernel, Launch, Program, call_size

# Dynamic shared memory that a kernel may use without a setting that allows more.
USUAL_SHARED_BYTES = 48 * 1024

# What the driver says about an image that is newer than itself.
UNKNOWN_IMAGE = (
    driver.CUresult.CUDA_ERROR_INVALID_IMAGE,
    driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,
    driver.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
)


class Loaded(NamedTuple):
    """A kernel loaded in a CUDA context: the driver's handle, and what its image says (`Image`)."""

    function: Any
    shared_bytes: int
    waits: bool


class Launcher:
    """Launches the kernels of a program; modules are loaded once per CUDA context and shared by all launchers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._loaded: dict[int, tuple[Loaded, ...]] = {}

    def load(self) -> tuple[Loaded, ...]:
        """Load the program's kernels into the thread's current CUDA context.

        Loading may wait for the device, which is not allowed during the capture of a stream. Load before the capture.

        Raises:
            RuntimeError: a kernel has no image for the GPU, or the driver refuses one.
        """
        context = int(_done(driver.cuCtxGetCurrent()))
        if context not in self._loaded:
            sm = _capability(context)
            self._loaded[context] = tuple(_load(context, sm, kernel) for kernel in self.program.kernels)
        return self._loaded[context]

    def run(
        self, shape: Sequence[int], inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Run the launches of one call.

        Args:
            shape: shape of input 0; its first dimensions are batch and seqlen.
            inputs, outputs, workspace: addresses on the device.
            stream: handle of a CUDA stream.

        Raises:
            ValueError: no plan covers the call, or an address is not aligned.
            RuntimeError: see `load`; or the driver refuses a launch.
        """
        batch, seqlen = call_size(shape)
        plan = self.program.plan(batch, seqlen)
        _check_addresses("input", self.program.inputs, inputs)
        _check_addresses("output", [output.dtype for output in self.program.outputs], outputs)
        loaded = self.load()

        def value(argument: Argument) -> int:
            if argument.kind == "int":
                return argument.size(batch, seqlen)
            if argument.kind == "workspace":
                return workspace + argument.value
            return tensors[argument.kind][argument.value] + argument.offset

        tensors = {"input": inputs, "output": outputs}
        for launch in plan.launches:
            kernel = self.program.kernels[launch.kernel]
            values = [*map(value, launch.arguments), *[0] * kernel.hidden]
            _launch(loaded[launch.kernel], kernel, launch, (batch, seqlen), values, stream)


def _check_addresses(what: str, dtypes: Sequence[str], addresses: Sequence[int]) -> None:
    # Kernels load 16 bytes at a time. An unaligned load is a GPU fault, which destroys the CUDA context.
    for i, (dtype, address) in enumerate(zip(dtypes, addresses, strict=True)):
        if dtype != "int32" and address % ALIGNED:
            raise ValueError(f"{what} {i} does not begin at a multiple of {ALIGNED} bytes")


def _launch(
    loaded: Loaded, kernel: Kernel, launch: Launch, size: tuple[int, int], values: Sequence[int], stream: int
) -> None:
    # A parameter has at most eight bytes, little-endian, so an int32 is read from the first four bytes of its cell.
    cells = (ctypes.c_uint64 * len(values))(*values)
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(cells) + 8 * i for i in range(len(values))))
    grid, block = (axis(*size) for axis in launch.grid), (kernel.threads, 1, 1)
    parameters = ctypes.addressof(places)
    if not loaded.waits:
        own = (*grid, *block, loaded.shared_bytes, driver.CUstream(stream))
        _done(driver.cuLaunchKernel(loaded.function, *own, parameters, 0))
        return
    # A kernel that waits by itself may start before the launch in front of it has ended.
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes, config.hStream = loaded.shared_bytes, driver.CUstream(stream)
    config.attrs, config.numAttrs = [attribute], 1
    _done(driver.cuLaunchKernelEx(config, loaded.function, parameters, 0))


def _load(context: int, sm: int, kernel: Kernel) -> Loaded:
    images = {image.sm: image for image in kernel.images}
    chosen = serving(images, sm)
    if chosen is None:
        carried = ", ".join("PTX" if image == PTX else f"sm_{image}" for image in images) or "nothing"
        raise RuntimeError(f"kernel {kernel.name} is compiled for {carried}; none of it runs on this GPU, sm_{sm}")
    for image in (images[chosen], images.get(PTX)):
        module = None if image is None else _module(context, image.data)
        if image is not None and module is not None:
            return _function(module, image, kernel.name)
    raise RuntimeError(
        f"the driver does not know the image of kernel {kernel.name} for sm_{sm}; "
        f"images for sm_{NEW_FORMAT_SM} and later need driver {NEW_FORMAT_DRIVER}"
    )


def _function(module: Any, image: Image, name: str) -> Loaded:
    function = _done(driver.cuModuleGetFunction(module, name.encode()))
    if image.shared_bytes > USUAL_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _done(driver.cuFuncSetAttribute(function, attribute, image.shared_bytes))
    return Loaded(function, image.shared_bytes, image.waits)


@cache
def _module(_context: int, image: bytes) -> Any:
    """Load an image; None if the driver is too old for its format."""
    status, module = driver.cuModuleLoadData(image + b"\0")  # PTX must end with a zero byte
    return None if status in UNKNOWN_IMAGE else _done((status, module))


@cache
def _capability(_context: int) -> int:
    device, attribute = _done(driver.cuCtxGetDevice()), driver.CUdevice_attribute
    parts = [
        _done(driver.cuDeviceGetAttribute(one, device))
        for one in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    ]
    return 10 * parts[0] + parts[1]


def _done(result: tuple[Any, ...]) -> Any:
    """Check the status that a driver function returned, and return its other result.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if values else None
