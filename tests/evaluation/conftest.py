"""A bundle with a low-bit copy of all matrices."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def with_copies(bundle, tmp_path):
    """A folder of its own, which a test may change."""
    return shutil.copytree(bundle("llama-blocks", kind="quantized-shadow", rest="shadow"), tmp_path / "with-copies")
