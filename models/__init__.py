"""Model families as one `ModelSpec` and one set of canonical weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec, RopeSpec

if TYPE_CHECKING:
    from shadowllm.models.decoder import Decoder, KVCache
    from shadowllm.models.files.checkpoint import Checkpoint
    from shadowllm.models.registry import load_model
    from shadowllm.models.weights import Weights

__all__ = ["Budget", "Checkpoint", "Decoder", "KVCache", "ModelSpec", "RopeSpec", "Weights", "load_model"]

# These bring PyTorch, which takes seconds to import: running a bundle must not wait for it.
_LAZY = {
    "Checkpoint": "checkpoint",
    "Decoder": "decoder",
    "KVCache": "decoder",
    "Weights": "weights",
    "load_model": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
