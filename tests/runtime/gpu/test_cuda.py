"""The CUDA calls of an engine session. Without a GPU, the real library only returns error codes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.plugins.tensorrt.load_tensorrt import gpu_capability
from shadowllm.runtime.gpu.cuda import Cuda, CudaError, no_garbage_collection

runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
pytestmark = pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU here")


@pytest.fixture
def cuda():
    """A `Cuda` that assumes a GPU, so that every call reaches the library."""
    made = object.__new__(Cuda)
    made._api, made.stream, made._held = runtime, 0, []
    return made


@pytest.mark.skipif(runtime.cudaDriverGetVersion()[1] != 0, reason="there is a driver here")
def test_without_a_driver():
    with pytest.raises(UserError, match=r"no driver is installed here; install the NVIDIA driver, or .*--backend ort"):
        Cuda()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "cudaErrorInsufficientDriver",
            r"knows CUDA up to 11\.8, .* needs 1.*; update the NVIDIA driver",
        ),
        (
            "cudaErrorNoDevice",
            r"CUDA finds none here \(cudaErrorNoDevice\).*--backend ort",
        ),
    ],
)
def test_with_an_old_driver_or_no_gpu(monkeypatch, error, words):
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (getattr(runtime.cudaError_t, error), None))
    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (runtime.cudaError_t.cudaSuccess, 11080))
    with pytest.raises(UserError, match=words):
        Cuda()


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("cudaMalloc", lambda cuda: cuda.allocate(64)),
        ("cudaMallocHost", lambda cuda: cuda.pinned((2, 3), np.int64)),
        ("cudaMemcpyAsync", lambda cuda: cuda.write(256, np.arange(3))),
        ("cudaMemcpyAsync", lambda cuda: cuda.read(np.arange(3), 256)),
        ("cudaMemcpyAsync", lambda cuda: cuda.copy(256, 512, 8)),
        ("cudaStreamSynchronize", lambda cuda: cuda.wait()),
        ("cudaEventCreateWithFlags", lambda cuda: cuda.event()),
        ("cudaEventRecord", lambda cuda: cuda.record(runtime.cudaEvent_t(8))),
        ("cudaEventSynchronize", lambda cuda: cuda.wait_for(runtime.cudaEvent_t(8))),
        ("cudaStreamBeginCapture", lambda cuda: cuda.capture(lambda: None)),
        ("cudaStreamSynchronize", lambda cuda: cuda.close()),
        ("cudaMemsetAsync", lambda cuda: cuda._call("cudaMemsetAsync", 256, 0, 8, 0)),
        ("cudaStreamEndCapture", lambda cuda: cuda._call("cudaStreamEndCapture", 0)),
        ("cudaGraphInstantiate", lambda cuda: cuda._call("cudaGraphInstantiate", runtime.cudaGraph_t(8), 0)),
        ("cudaGraphLaunch", lambda cuda: cuda._call("cudaGraphLaunch", runtime.cudaGraphExec_t(8), 0)),
        ("cudaFree", lambda cuda: cuda._call("cudaFree", 256)),
        ("cudaFreeHost", lambda cuda: cuda._call("cudaFreeHost", 256)),
    ],
)
def test_a_failure_names_its_call(cuda, call, work):
    """The arguments have the right types too, or the binding would raise a TypeError."""
    with pytest.raises(CudaError, match=f"{call} failed: cudaError"):
        work(cuda)


def test_too_little_memory_is_the_user_s_to_mend(cuda, monkeypatch):
    monkeypatch.setattr(runtime, "cudaMalloc", lambda size: (runtime.cudaError_t.cudaErrorMemoryAllocation, None))
    with pytest.raises(UserError, match=r"cudaMalloc: the GPU's memory is not enough.*--capacity"):
        cuda.allocate(1 << 40)


def test_memory_and_graphs_are_freed_in_reverse(cuda, monkeypatch):
    log, good = [], runtime.cudaError_t.cudaSuccess

    def note(name, *result):
        monkeypatch.setattr(runtime, name, lambda *arguments: log.append((name, *arguments)) or (good, *result))

    for name, result in (
        ("cudaMalloc", (4096,)),
        ("cudaStreamEndCapture", ("graph",)),
        ("cudaGraphInstantiate", ("x",)),
    ):
        note(name, *result)
    for name in ("cudaMemsetAsync", "cudaStreamBeginCapture", "cudaGraphDestroy", "cudaGraphLaunch",
                 "cudaStreamSynchronize", "cudaGraphExecDestroy", "cudaFree", "cudaStreamDestroy"):  # fmt: skip
        note(name)
    assert cuda.allocate(100) == 4096
    cuda.capture(lambda: log.append("work"))()
    cuda.close()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert log == [
        ("cudaMalloc", 100),
        ("cudaMemsetAsync", 4096, 0, 100, 0),
        ("cudaStreamBeginCapture", 0, mode),
        "work",
        ("cudaStreamEndCapture", 0),
        ("cudaGraphInstantiate", "graph", 0),
        ("cudaGraphDestroy", "graph"),
        ("cudaGraphLaunch", "x", 0),
        ("cudaStreamSynchronize", 0),
        ("cudaGraphExecDestroy", "x"),
        ("cudaFree", 4096),
        ("cudaStreamDestroy", 0),
    ]


class Node:
    """Garbage that only the garbage collector frees."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_during_a_capture(cuda, monkeypatch, fails):
    good = runtime.cudaError_t.cudaSuccess
    for name in ("cudaStreamBeginCapture", "cudaGraphDestroy"):
        monkeypatch.setattr(runtime, name, lambda *arguments: (good,))
    for name in ("cudaStreamEndCapture", "cudaGraphInstantiate"):
        monkeypatch.setattr(runtime, name, lambda *arguments: (good, "graph"))
    before, within = Node(), []
    gone = weakref.ref(before)
    del before

    def work():
        assert gone() is None, "what was garbage before the capture was collected before it"
        within.append(weakref.ref(Node()))
        garbage = [Node() for _ in range(10 * gc.get_threshold()[0])]  # would start the collector a few times
        del garbage
        _ = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert within[0]() is not None
        if fails:
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            cuda.capture(work)
    else:
        cuda.capture(work)
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
