"""OPT (Zhang et al., arXiv 2205.01068): LayerNorm (before the blocks, or after them in OPT-350m), ReLU, biases."""

from __future__ import annotations

from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.activations import read_activation
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source

# Our name -> the name in a layer of the checkpoint.
PARTS = {
    "input_norm": "self_attn_layer_norm",
    "post_norm": "final_layer_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
# OPT keeps two unused rows before position 0 of its position table.
POSITION_OFFSET = 2


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``OPTConfig``.

    Raises:
        UserError: the model is a variant that this adapter does not support; the message names it.
    """
    _refuse_variants(config)
    activation, threshold = read_activation(config)
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
        activation=activation,
        activation_threshold=threshold,
        gated=False,
        positions="learned",
        position_offset=POSITION_OFFSET,
        qkv_bias=config.enable_bias,
        o_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        tied_embeddings=config.tie_word_embeddings and not _projects(config),
        pre_norm=config.do_layer_norm_before,
    )


def _refuse_variants(config: Any) -> None:
    if not config.layer_norm_elementwise_affine or (config.do_layer_norm_before and config._remove_final_layer_norm):
        raise UserError(
            "OPT without LayerNorm weights or without its final LayerNorm is not supported",
            "use a standard OPT checkpoint",
        )


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face OPT checkpoint.

    OPT-350m has narrow embeddings, and a projection to the hidden size and back. Both are multiplied into the tables.
    """
    table, head = "decoder.embed_tokens.weight", "lm_head.weight"
    found = {
        "embed_tokens.weight": Source(table),
        "embed_positions.weight": Source("decoder.embed_positions.weight"),
    }
    if not spec.tied_embeddings:
        found["lm_head.weight"] = Source(head)
    if _projects(config):
        to, back = "decoder.project_in.weight", "decoder.project_out.weight"
        found["embed_tokens.weight"] = Source(table, factor=to, factor_transposed=True)
        found["lm_head.weight"] = Source(table if config.tie_word_embeddings else head, factor=back)
    for i in range(spec.n_layers):
        found |= _layer_sources(spec, i)
    norm = "decoder.final_layer_norm" if spec.pre_norm else f"decoder.layers.{spec.n_layers - 1}.final_layer_norm"
    return found | {f"final_norm.{kind}": Source(f"{norm}.{kind}") for kind in ("weight", "bias")}


def _layer_sources(spec: ModelSpec, layer: int) -> dict[str, Source]:
    found = {}
    for name, theirs in PARTS.items():
        place, prefix = f"layers.{layer}.{name}", f"decoder.layers.{layer}.{theirs}"
        if name.endswith("norm") and place not in spec.norms_of(layer):
            continue
        found[f"{place}.weight"] = Source(f"{prefix}.weight", transpose=name in ("o_proj", "down_proj"))
        if name.endswith("norm") or spec.o_bias:
            found[f"{place}.bias"] = Source(f"{prefix}.bias")
    return found


def _projects(config: Any) -> bool:
    return bool(config.word_embed_proj_dim != config.hidden_size)


def _divide(total: int, parts: int) -> int:
    if total % parts:
        raise UserError(f"hidden_size {total} does not divide into {parts} heads", "check config.json")
    return total // parts
