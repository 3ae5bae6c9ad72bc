"""Skips, with a reason, each instruction set of the native kernels that this CPU lacks."""

from __future__ import annotations

import pytest

from shadowllm.plugins import native_ops


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "portable"])
def test_this_cpu_runs_the_kernels_for(isa):
    if isa not in native_ops.kernels():
        pytest.skip(f"this CPU lacks {isa}, or the native ops are not built: no test ran the native kernels for it")
