"""A setting of the C library that makes passes over long windows faster."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 1 GiB of freed memory for reuse instead of handing it back.

    The activations of a pass are a few megabytes each. By default every one is mapped, faulted in
    page by page and unmapped again, which took as long as the arithmetic on the machine measured.
    Process-wide, so for commands to call, not for library code. Returns whether it took effect
    (not where the C library is another one).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, KEPT_BYTES) for what in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
