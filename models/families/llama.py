"""Llama 2/3 and compatible models (SmolLM2, TinyLlama): RMSNorm, RoPE, gated SiLU, optional GQA."""

from __future__ import annotations

from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.activations import read_activation
from shadowllm.models.spec import ModelSpec, RopeSpec
from shadowllm.models.weights import Source

# Parameters of each RoPE scaling: Hugging Face's name -> the name in `RopeSpec`.
ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {"rope_theta": "theta"},
    "linear": {"rope_theta": "theta", "factor": "factor"},
    "llama3": {
        "rope_theta": "theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seqlen",
    },
}


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``LlamaConfig``.

    Raises:
        UserError: the model is a variant that this adapter does not support; the message names it.
    """
    activation, threshold = read_activation(config)
    return ModelSpec(
        family="llama",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_seqlen=config.max_position_embeddings,
        norm="rmsnorm",
        norm_eps=config.rms_norm_eps,
        activation=activation,
        activation_threshold=threshold,
        gated=True,
        positions="rope",
        rope=_rope(config),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tied_embeddings=config.tie_word_embeddings,
    )


def _rope(config: Any) -> RopeSpec:
    # Moves some keys from the top level of the config into rope_parameters, as transformers does to build the model.
    config.standardize_rope_params()
    parameters = dict(config.rope_parameters)
    scaling = parameters.get("rope_type", "default")
    if scaling not in ROPE_KEYS:
        raise UserError(f"RoPE scaling {scaling!r} is not supported", f"supported: {', '.join(ROPE_KEYS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial rotary embeddings are not supported", "use a model that rotates whole heads")
    missing = [name for name in ROPE_KEYS[scaling] if name not in parameters]
    if missing:
        raise UserError(
            f"RoPE scaling {scaling!r} needs {missing[0]}", "config.json does not give it: correct it there"
        )
    return RopeSpec(scaling=scaling, **{ours: parameters[key] for key, ours in ROPE_KEYS[scaling].items()})


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Llama checkpoint."""
    found = {
        "embed_tokens.weight": Source("embed_tokens.weight"),
        "final_norm.weight": Source("norm.weight"),
    }
    if not spec.tied_embeddings:
        found["lm_head.weight"] = Source("lm_head.weight")
    biased = {
        "q_proj": spec.qkv_bias,
        "k_proj": spec.qkv_bias,
        "v_proj": spec.qkv_bias,
        "o_proj": spec.o_bias,
        "gate_proj": spec.mlp_bias,
        "up_proj": spec.mlp_bias,
        "down_proj": spec.mlp_bias,
    }
    for i in range(spec.n_layers):
        place = f"layers.{i}"
        found[f"{place}.input_norm.weight"] = Source(f"{place}.input_layernorm.weight")
        found[f"{place}.post_norm.weight"] = Source(f"{place}.post_attention_layernorm.weight")
        for name, bias in biased.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            theirs = f"{place}.{block}.{name}"
            found[f"{place}.{name}.weight"] = Source(f"{theirs}.weight", transpose=name in ("o_proj", "down_proj"))
            if bias:
                found[f"{place}.{name}.bias"] = Source(f"{theirs}.bias")
    return found
