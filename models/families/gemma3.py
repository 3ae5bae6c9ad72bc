"""Gemma 3 (its text model): Gemma with norms of q, k and outputs, and with another RoPE in layers with a window.

The hidden states are those of Gemma 3, divided by the factor of its embeddings (see `factors`). So all norms have the
same smaller eps, and everything that is normed must be divided too: also q, k and the outputs of attention and MLP.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families.factors import Factors
from shadowllm.models.families.gemma import with_one_added
from shadowllm.models.families.llama import WINDOW, llama_like, llama_sources
from shadowllm.models.rope import is_positive, position_limit, read_rope, rotary_dim
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source

WHOLE = "full_attention"
# Options that change the model, and the values that do not.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}
# Our name -> the name in a layer of the checkpoint.
NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``Gemma3TextConfig``.

    Raises:
        UserError: logits or attention scores are capped, attention goes in both directions, or as `llama_like` does.
    """
    for name, usual in VARIANTS.items():
        if getattr(config, name) not in usual:
            raise UserError(f"Gemma 3 with {name} is not supported", "use a standard checkpoint of Gemma 3")
    windows = tuple(layer for layer, kind in enumerate(config.layer_types) if kind == WINDOW)
    if windows:
        _check_window_rope(config)
    found = llama_like(
        config,
        layer_type=WHOLE,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
        output_norms=True,
        second_rope=read_rope(config, WINDOW) if windows else None,
        second_rope_layers=windows,
    )
    return replace(found, norm_eps=_factors(config).norm_eps(found.norm_eps))


def _check_window_rope(config: Any) -> None:
    limit = position_limit(config, WINDOW)
    if limit is not None and limit < config.max_position_embeddings:
        raise UserError("Gemma 3 with longrope in layers with a window is not supported", "use a standard checkpoint")
    if rotary_dim(config, WINDOW) != config.head_dim:
        raise UserError(
            "Gemma 3 with partial_rotary_factor in layers with a window is not supported", "use a standard checkpoint"
        )


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Gemma 3 checkpoint."""
    found = llama_sources(spec, spec.head_dim)
    for i in range(spec.n_layers):
        found |= {f"layers.{i}.{ours}.weight": Source(f"layers.{i}.{theirs}.weight") for ours, theirs in NORMS.items()}
    smaller, scalar = 1 / _factors(config).embedding, config.query_pre_attn_scalar
    if not is_positive(scalar):
        raise UserError(
            f"query_pre_attn_scalar in config.json is {scalar!r}, and must be a positive number", "correct it there"
        )
    scales = {
        "q_proj": smaller,
        "k_proj": smaller,
        "q_norm": math.sqrt(spec.head_dim / scalar),
        "attention_output_norm": smaller,
        "mlp_output_norm": smaller,
    }
    scaled = {
        name: replace(source, scale=scales.get(name.split(".")[-2], 1.0))
        for name, source in with_one_added(found).items()
    }
    return _factors(config).scaled(spec, scaled)


def _factors(config: Any) -> Factors:
    return Factors(math.sqrt(config.hidden_size))
