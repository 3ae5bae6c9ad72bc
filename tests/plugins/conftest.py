"""Fixtures for the tests of plugins."""

from __future__ import annotations

import pytest

from shadowllm.plugins import native_ops


@pytest.fixture(
    params=native_ops.kernels() or [pytest.param("", marks=pytest.mark.skip("the native ops are not built"))]
)
def isa(request, monkeypatch) -> str:
    """Name of the native kernels to use: each that this CPU can run. `test_instruction_sets` lists the others."""
    monkeypatch.setenv(native_ops.ISA_VARIABLE, request.param)
    return request.param
