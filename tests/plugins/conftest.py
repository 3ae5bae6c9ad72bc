"""Fixtures of the tests of plugins."""

from __future__ import annotations

import pytest

from shadowllm.plugins import native_ops


@pytest.fixture(params=["avx512vnni", "avx512", "avx2", "portable"])
def isa(request, monkeypatch) -> str:
    """Name of the native kernels to use: each in turn, those that this CPU cannot run skipped."""
    if request.param not in native_ops.kernels():
        pytest.skip(f"this CPU cannot run {request.param}")
    monkeypatch.setenv(native_ops.ISA_VARIABLE, request.param)
    return request.param
