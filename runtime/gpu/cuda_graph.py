"""Where Triton's kernels run, and work captured once as a CUDA graph to be replayed without Python."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from shadowllm.errors import UserError
from shadowllm.runtime.gpu.cuda import no_garbage_collection

# Kernels compile, and libraries allocate, before a capture: neither is possible during one.
WARMUP = 2


def kernel_device() -> torch.device:
    """Where the Triton kernels run: the GPU, or the CPU under ``TRITON_INTERPRET=1``.

    Raises:
        UserError: there is neither, or no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("the package triton is not installed", "pip install triton, or use --backend ort")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "the triton backend needs an NVIDIA GPU, and PyTorch sees none here",
            "use --backend ort; TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly, to check them",
        )
    return torch.device("cuda", torch.cuda.current_device())


def captured(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``work`` as one CUDA graph; on a CPU, ``work`` itself.

    It runs a few times for warm-up and capture: leave it where that does no harm. It may not wait for the
    GPU, and every run reads and writes the same tensors.
    """
    if device.type == "cpu":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with no_garbage_collection(), torch.cuda.graph(graph):
        work()
    return graph.replay
