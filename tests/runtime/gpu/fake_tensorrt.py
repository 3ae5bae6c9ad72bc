"""Fake engines for tests without a GPU: ONNX Runtime computes them, and host memory is the device memory.

This tests how a session uses TensorRT and CUDA: bindings, the order of graphs, the captured step and the copies. It
does not test the engines and kernels themselves.
"""

from __future__ import annotations

import ast
import ctypes
import types
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle.engine_record import EngineRecord, write_sidecar
from shadowllm.bundle.manifest import file_hash
from shadowllm.bundle.op_domain import VERSION
from shadowllm.exporter.engines.graph import describe_onnx, pick_greedily, read_onnx
from shadowllm.exporter.engines.profiles import profiles_for

FLAVOUR, TRT_VERSION = "tensorrt_rtx", "0.0.played"


def at(address, shape, dtype):
    """The array at an address."""
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    data = np.frombuffer(memoryview((ctypes.c_byte * size).from_address(address)), dtype=np.uint8)
    return data[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


class HostCuda:
    """`Cuda` on host memory. Work is done at once, or recorded while a graph is captured."""

    stream = 7

    def __init__(self):
        self.held, self.graph, self.replays, self.closed = {}, None, 0, False

    def do(self, work):
        if self.graph is None:
            work()
        else:
            self.graph.append(work)

    def allocate(self, size):
        memory = np.zeros(size + 256, dtype=np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        self.held[address] = memory
        return address

    def clear(self, address, size):
        ctypes.memset(address, 0, size)

    def pinned(self, shape, dtype):
        return np.zeros(shape, dtype=dtype)

    def write(self, address, array):
        assert self.graph is None, "a write waits, which a captured step must not"
        assert array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def read(self, array, address):
        assert array.flags.c_contiguous
        self.do(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def copy(self, target, source, size):
        self.do(lambda: ctypes.memmove(target, source, size))

    def wait(self):
        assert self.graph is None, "a captured step must not wait"

    def event(self):
        return object()

    def record(self, event):
        pass

    def wait_for(self, event):
        self.wait()

    def capture(self, work):
        self.graph = []
        try:
            work()
        finally:
            noted, self.graph = self.graph, None

        def replay():
            self.replays += 1
            for one in noted:
                one()

        return replay

    def release(self):
        self.held.clear()

    def close(self):
        self.release()
        self.closed = True


DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
DTYPES = {"tensor(int64)": "INT64", "tensor(int32)": "INT32", "tensor(float)": "FLOAT"}
NUMPY = {"INT64": np.int64, "INT32": np.int32, "FLOAT": np.float32}


class RuntimeCache:
    """Stores the shapes that were "compiled". Like the real cache, it refuses files that it did not write."""

    MAGIC = b"played "

    def __init__(self):
        self.compiled = set()

    def serialize(self):
        return memoryview(self.MAGIC + repr(sorted(self.compiled)).encode()) if self.compiled else None

    def deserialize(self, blob):
        if not blob.startswith(self.MAGIC):
            return False
        self.compiled = set(ast.literal_eval(blob.removeprefix(self.MAGIC).decode()))
        return True


class RuntimeConfig:
    """The configuration of a TensorRT-RTX context."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def __init__(self):
        self.allocation = self.cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


@dataclass
class Context:
    """An execution context; there is one per phase."""

    engine: object
    config: RuntimeConfig | None = None
    profile: int = -1
    scratch: tuple = ()
    shapes: dict = field(default_factory=dict)
    addresses: dict = field(default_factory=dict)

    def set_optimization_profile_async(self, index, _stream):
        self.profile = index
        return True

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return name in self.engine.inputs

    def execute_async_v3(self, stream):
        assert stream == HostCuda.stream
        assert self.scratch
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.config and (key := repr((self.profile, sorted(shapes.items())))) not in self.config.cache.compiled:
            assert self.engine.cuda.graph is None, "nothing may compile while a step is captured"
            self.config.cache.compiled.add(key)
            self.engine.compilations += 1
        self.engine.cuda.do(lambda: self.engine.run(shapes, addresses))
        return True


class Engine:
    """A graph in ONNX Runtime with the part of ``ICudaEngine`` that a session uses."""

    device_memory_size_v2 = 1000
    compilations = 0

    def __init__(self, model, bundle, cuda):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.cuda, self.num_io_tensors = cuda, len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[DTYPES[(self.inputs | self.outputs)[name].type]]

    def get_aliased_input_tensor(self, name):
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else None

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, how):
        if how == "user managed":
            return Context(self)
        assert how.allocation == "user managed"
        return Context(self, how)

    def run(self, shapes, addresses):
        def there(name, shape):
            return at(addresses[name], shape, NUMPY[self.get_tensor_dtype(name).name])

        feeds = {name: there(name, shapes[name]).copy() for name in self.inputs}
        for name, value in zip(self.outputs, self.session.run(None, feeds), strict=True):
            there(name, value.shape)[...] = value


def played(bundle, cuda, rtx=True):
    """A TensorRT module whose engines are those that `write_engines` wrote.

    Args:
        rtx: with what only TensorRT-RTX has.
    """

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, serialised):
            return Engine(bytes(serialised), bundle, cuda)

    class ILogger:
        ERROR = 1

    trt = types.ModuleType("played_tensorrt")
    registry = types.SimpleNamespace(load_library=lambda path: None)
    strategies = types.SimpleNamespace(USER_MANAGED="user managed")
    trt.__dict__.update(
        __version__=TRT_VERSION,
        Runtime=Runtime,
        ILogger=ILogger,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=strategies,
        get_plugin_registry=lambda: registry,
    )
    if rtx:
        trt.IRuntimeCache = RuntimeCache
        trt.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    return trt


def write_engines(bundle, manifest, *, capacity=16, max_seqlen=8, max_batch=2, max_kept=1, pieces=None):
    """Write fake engine files: each graph, ready for ONNX Runtime, and a record as a build writes it."""
    folder = bundle / "engines" / FLAVOUR
    folder.mkdir(parents=True, exist_ok=True)
    for piece in pieces or manifest.sparse_pieces:
        path, onnx = folder / f"{piece}.engine", bundle / f"{piece}.onnx"
        model = read_onnx(onnx)
        pick_greedily(model.graph)
        path.write_bytes(ir.to_proto(model).SerializeToString())
        sizes = {"capacity": capacity, "max_seqlen": max_seqlen, "max_batch": max_batch, "max_kept": max_kept}
        write_sidecar(
            path,
            EngineRecord(
                flavour=FLAVOUR,
                version=TRT_VERSION,
                compute_capabilities=(80,),
                plugin_version=VERSION,
                plugins=(),
                kernels={},
                profiles=tuple(profiles_for(describe_onnx(onnx), **sizes)),
                files=manifest.digests(onnx.name),
                engine_sha256=file_hash(path),
                engine_bytes=path.stat().st_size,
                build_seconds=0.0,
            ),
        )
