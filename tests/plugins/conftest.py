"""Fixtures of the tests of plugins."""

from __future__ import annotations

import pytest

from shadowllm.plugins import native_ops


@pytest.fixture(
    params=native_ops.kernels() or [pytest.param("", marks=pytest.mark.skip("the native ops are not built"))]
)
def isa(request, monkeypatch) -> str:
    """Name of the native kernels to use: in turn, all that this CPU runs; `test_instruction_sets` names the others."""
    monkeypatch.setenv(native_ops.ISA_VARIABLE, request.param)
    return request.param
