"""Qwen3: Llama with a norm of each head's query and key."""

from __future__ import annotations

from typing import Any

from shadowllm.models.families.llama import llama_like
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``Qwen3Config``; raises as `llama_like` does."""
    return llama_like(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True)
