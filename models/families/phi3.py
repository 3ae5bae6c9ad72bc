"""Phi-3 and Phi-4-mini: Llama with q, k and v in one stored matrix, and gate and up in another."""

from __future__ import annotations

from typing import Any

from shadowllm.models.families.llama import MLP, llama_like, llama_sources
from shadowllm.models.rope import rotary_dim
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source, stacked

# Stored matrix -> its parts, in order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``Phi3Config``; raises as `llama_like` does."""
    return llama_like(config, partial_rotary=True)


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Phi-3 checkpoint."""
    found = llama_sources(spec, rotary_dim(config, None))
    for i in range(spec.n_layers):
        for whole, parts in FUSED.items():
            block = "mlp" if parts[0] in MLP else "self_attn"
            names = [f"layers.{i}.{part}.weight" for part in parts]
            found |= stacked(spec, found, names, f"layers.{i}.{block}.{whole}.weight")
    return found
