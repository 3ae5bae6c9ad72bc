"""Kernels get memory that others have used."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    """PyTorch's new bytes, and so the workspaces of Triton's kernels, are full of ones: -1, or NaN."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    empty = torch.empty

    def used(*sizes, **options):
        found = empty(*sizes, **options)
        return found.fill_(0xFF) if found.dtype == torch.uint8 else found

    monkeypatch.setattr(torch, "empty", used)
