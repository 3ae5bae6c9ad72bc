"""Kernels get memory that others have used, between pages that they must not touch."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    """PyTorch's new bytes, and so the workspaces of Triton's kernels, are full of ones: -1, or NaN."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from tests.plugins.guard_pages import guarded

    empty = torch.empty

    def used(*sizes, **options):
        found = empty(*sizes, **options)
        if found.dtype != torch.uint8:
            return found
        return guarded(found.fill_(0xFF)) if found.is_cpu else found.fill_(0xFF)

    monkeypatch.setattr(torch, "empty", used)
