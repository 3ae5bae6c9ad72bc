"""Skips, with a reason, each instruction set of the native kernels that this CPU lacks."""

from __future__ import annotations

import pytest

from shadowllm.plugins import native_ops


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "portable"])
def test_the_library_has_kernels_for(isa):
    found = native_ops.kernels()
    if not found:
        pytest.skip("the native ops are not built: no test ran their kernels")
    if isa not in found and isa != "portable":  # every CPU runs these
        pytest.skip(f"this CPU lacks {isa}: no test ran the native kernels for it")
    assert isa in found
