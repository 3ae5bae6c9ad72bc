"""SmolLM3: Llama with layers without RoPE."""

from __future__ import annotations

from typing import Any

from shadowllm.models.families.llama import llama_like
from shadowllm.models.rope import RopeSpec
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``SmolLM3Config``; raises as `llama_like` does."""
    # "no_rope_layers" has a 1 for each layer with RoPE.
    without = tuple(layer for layer, rotates in enumerate(config.no_rope_layers) if not rotates)
    return llama_like(
        config,
        second_rope=RopeSpec(()) if without else None,
        second_rope_layers=without,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
