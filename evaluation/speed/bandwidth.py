"""Read bandwidth of this machine: the roof over every decode step on a CPU."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Far beyond any last-level cache, so that a pass cannot be served from the one before.
BUFFER_BYTES = 1 << 29


def read_bandwidth(threads: int | None = None, passes: int = 7, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Best rate over ``passes`` at which ``threads`` threads sum a large float32 buffer.

    A sum is one vector addition per load, so memory sets the pace; NumPy leaves the interpreter
    lock while it adds. The best pass counts: this is a roof, and other load only lowers it.

    Args:
        threads: every core when None.
        buffer_bytes: make it at least four times the last-level cache.

    Returns:
        GB/s (1e9 bytes).
    """
    threads = threads or os.cpu_count() or 1
    buffer = np.ones(buffer_bytes // 4, dtype=np.float32)  # written, so that every page is a real one
    slices = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.sum, slices))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9
