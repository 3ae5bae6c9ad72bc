"""Qwen2 and Qwen2.5: Llama with biases of q, k and v."""

from __future__ import annotations

from typing import Any

from shadowllm.models.families.llama import llama_like
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``Qwen2Config``; raises as `llama_like` does."""
    return llama_like(config, qkv_bias=True)
