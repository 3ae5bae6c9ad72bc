"""Settings of glibc: freed memory is kept to make forward passes faster, and handed back after them."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 1 GiB of freed memory for reuse instead of handing it back.

    The activations of a pass are a few megabytes each. By default each one is mapped, faulted in page
    by page and unmapped again. On the measured machine this took as long as the arithmetic.

    The setting is process-wide, so only whole jobs such as calibration call this.

    Returns:
        Whether it took effect; False if the C library is not glibc.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(what, KEPT_BYTES) for what in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


def return_freed_memory() -> bool:
    """Hand freed memory back to the system, also what `keep_freed_memory` keeps.

    Returns:
        Whether there was any; False if the C library is not glibc.
    """
    malloc_trim = _glibc("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(0))


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
