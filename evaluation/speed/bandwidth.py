"""Measurement of memory read bandwidth, the upper limit for the speed of a decode step on a CPU."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Much larger than a last-level cache, so that a pass cannot read cached data of the previous one.
BUFFER_BYTES = 1 << 29


def read_bandwidth(threads: int | None = None, passes: int = 7, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Measure the best rate over ``passes`` at which ``threads`` threads sum a large float32 buffer.

    A sum is one vector addition per load, so memory limits its speed. NumPy releases the interpreter lock while it
    adds. The best pass counts, because other load on the machine can only lower the rate.

    Args:
        threads: all cores if None.
        buffer_bytes: should be at least four times the last-level cache.

    Returns:
        GB/s (1e9 bytes).
    """
    threads = threads or os.cpu_count() or 1
    buffer = np.ones(buffer_bytes // 4, dtype=np.float32)  # writing makes the system allocate every page
    slices = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.sum, slices))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9
