"""SmolLM3: Llama with layers without RoPE."""

from __future__ import annotations

from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families.llama import llama_like
from shadowllm.models.rope import RopeSpec
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``SmolLM3Config``.

    Raises:
        UserError: a layer does not say whether it rotates, or as `llama_like` does.
    """
    # "no_rope_layers" has a 1 for each layer with RoPE.
    rotates = config.no_rope_layers[: config.num_hidden_layers]
    if len(rotates) < config.num_hidden_layers:
        raise UserError(
            f"no_rope_layers has {len(rotates)} numbers for {config.num_hidden_layers} layers", "correct config.json"
        )
    without = tuple(layer for layer, rotated in enumerate(rotates) if not rotated)
    return llama_like(
        config,
        second_rope=RopeSpec(()) if without else None,
        second_rope_layers=without,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
