"""A bundle with a low-bit copy of all matrices."""

from __future__ import annotations

import shutil

import pytest

from shadowllm.bundle import cost_model
from shadowllm.models.sparsity import UNITS


@pytest.fixture
def with_copies(bundle, tmp_path):
    """A folder of its own, which a test may change."""
    return shutil.copytree(bundle("llama-blocks", kind="quantized-shadow", rest="shadow"), tmp_path / "with-copies")


@pytest.fixture
def bytes_only(monkeypatch):
    """Steps cost their bytes: a tiny model reads less than a selection costs."""
    for name, cost in (("COPY_COST", 1), ("SELECTION_COST", dict.fromkeys(UNITS, 0)), ("PICKED_ROW_COST", 0)):
        monkeypatch.setattr(cost_model, name, cost)
