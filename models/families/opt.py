"""OPT (Zhang et al., arXiv 2205.01068): pre-norm LayerNorm, learned positions, ReLU, biases."""

from __future__ import annotations

from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source

# OPT keeps two unused rows before position 0 of its position table.
POSITION_OFFSET = 2


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``OPTConfig``.

    Raises:
        UserError: the model is a variant that this adapter does not support; the message names it.
    """
    _refuse_variants(config)
    activation = {"relu": "relu", "gelu": "gelu"}.get(config.activation_function)
    if activation is None:
        raise UserError(f"OPT activation {config.activation_function!r} is not supported", "use relu or gelu")
    return ModelSpec(
        family="opt",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_dim,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        head_dim=_divide(config.hidden_size, config.num_attention_heads),
        max_seqlen=config.max_position_embeddings,
        norm="layernorm",
        norm_eps=1e-5,
        activation=activation,  # type: ignore[arg-type]
        gated=False,
        positions="learned",
        position_offset=POSITION_OFFSET,
        qkv_bias=config.enable_bias,
        o_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        tied_embeddings=config.tie_word_embeddings,
    )


def _refuse_variants(config: Any) -> None:
    if not config.do_layer_norm_before:
        raise UserError(
            "OPT with post-norm layers (OPT-350m) is not supported", "use a pre-norm size such as opt-125m or opt-1.3b"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise UserError(
            "OPT with embedding projections (word_embed_proj_dim) is not supported",
            "use a size whose embeddings have the hidden size",
        )
    if not config.layer_norm_elementwise_affine or config._remove_final_layer_norm:
        raise UserError(
            "OPT without LayerNorm weights or without its final LayerNorm is not supported",
            "use a standard OPT checkpoint",
        )


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face OPT checkpoint."""
    found = {
        "embed_tokens.weight": Source("decoder.embed_tokens.weight"),
        "embed_positions.weight": Source("decoder.embed_positions.weight"),
        "final_norm.weight": Source("decoder.final_layer_norm.weight"),
        "final_norm.bias": Source("decoder.final_layer_norm.bias"),
    }
    if not spec.tied_embeddings:
        found["lm_head.weight"] = Source("lm_head.weight")
    parts = {
        "input_norm": "self_attn_layer_norm",
        "post_norm": "final_layer_norm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.out_proj",
        "up_proj": "fc1",
        "down_proj": "fc2",
    }
    for i in range(spec.n_layers):
        for name, theirs in parts.items():
            place, prefix = f"layers.{i}.{name}", f"decoder.layers.{i}.{theirs}"
            found[f"{place}.weight"] = Source(f"{prefix}.weight", transpose=name in ("o_proj", "down_proj"))
            if name.endswith("norm") or spec.o_bias:
                found[f"{place}.bias"] = Source(f"{prefix}.bias")
    return found


def _divide(total: int, parts: int) -> int:
    if total % parts:
        raise UserError(f"hidden_size {total} does not divide into {parts} heads", "check config.json")
    return total // parts
