"""The reference of GPU sessions, whose batches share one selection."""

from __future__ import annotations

from pathlib import Path

from shadowllm.runtime.torch_session import TorchSession


def reference(folder: Path) -> TorchSession:
    session = TorchSession.open(folder)
    session.shares_selection = True
    return session
