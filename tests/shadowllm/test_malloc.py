"""Freed memory is kept, and handed back on request; in another process, because the setting stays."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from shadowllm.malloc import keep_freed_memory, return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

assert keep_freed_memory()
block, last = bytes([1]) * (256 << 20), bytes([1]) * (1 << 20)  # what lies above a freed block keeps it from shrinking
del block
kept = resident()
assert return_freed_memory()
print(kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_is_handed_back():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    kept, left = (int(kib) / 1024 for kib in found.split())
    assert kept > 256
    assert left < 64
