"""Measures times on a GPU; work is replayed as a CUDA graph, so that Python's launch time does not count."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from shadowllm.runtime.gpu.cuda_graph import captured


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> dict[str, float] | None:
    """Time of one replay of ``work``, from events: median, min and max of ``repeats``, after three warm-ups.

    Returns:
        None on a CPU, where the work runs once, because times there mean nothing.
    """
    if device.type == "cpu":
        work()
        return None
    replay = captured(work, device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(3):
        replay()
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize(device)
    taken = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return {"median": float(np.median(taken)), "min": min(taken), "max": max(taken)}
