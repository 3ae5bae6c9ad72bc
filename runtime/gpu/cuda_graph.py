"""The device of the Triton kernels, and the capture of their launches as a CUDA graph."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from shadowllm.errors import UserError
from shadowllm.runtime.gpu.cuda import no_garbage_collection

# Runs before a capture, in which kernels compile and libraries allocate. Neither is possible during a capture.
WARMUP = 2


def kernel_device() -> torch.device:
    """The device on which Triton kernels run: the GPU, or the CPU under ``TRITON_INTERPRET=1``.

    Raises:
        UserError: no Triton, or no GPU without ``TRITON_INTERPRET=1``.
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
    """Capture ``work`` as one CUDA graph and return its replay; on a CPU, return ``work``.

    ``work`` runs a few times for warm-up, so call this where its effects do no harm. It must not wait for the GPU,
    and all runs read and write the same tensors.
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
