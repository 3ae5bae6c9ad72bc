"""Llama 2/3 and compatible models (SmolLM2, TinyLlama): RMSNorm, RoPE, gated SiLU, optional GQA.

Families that differ from Llama in a few points use `llama_like` and `llama_sources`.
"""

from __future__ import annotations

import warnings
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.activations import read_activation
from shadowllm.models.files.config import declares
from shadowllm.models.rope import (
    changes_beyond,
    position_limit,
    read_rope,
    rotary_dim,
    rotated_first,
    trained_positions,
)
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source

WINDOW = "sliding_attention"  # the type of a layer with a sliding window
MLP = ("gate_proj", "up_proj", "down_proj")


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``LlamaConfig``.

    Raises:
        UserError: the model is a variant that this adapter does not support; the message names it.
    """
    # Classes of a model's own code may be older than the biases.
    attention_bias, mlp_bias = (getattr(config, name, False) for name in ("attention_bias", "mlp_bias"))
    return llama_like(config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)


def llama_like(
    config: Any, *, partial_rotary: bool = False, layer_type: str | None = None, **differences: Any
) -> ModelSpec:
    """Read what configs of Llama and similar models have in common.

    Args:
        partial_rotary: whether models of the family can rotate a part of each head.
        layer_type: the type of layer whose RoPE is ``rope``, if the config has several types.
        differences: fields of the spec in which the family differs, or which Llama's config names differently.

    Raises:
        UserError: the activation, the RoPE scaling or the kind of attention is not supported.
    """
    activation, threshold = read_activation(config)
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if rotary_dim(config, layer_type) != config.head_dim and not partial_rotary:
        raise UserError(
            f"partial rotary embeddings are not supported in {config.model_type} models",
            "use a model that rotates whole heads",
        )
    max_seqlen = _max_seqlen(config, layer_type)
    window, window_layers = _window(config, max_seqlen)
    fields = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_seqlen": max_seqlen,
        "norm": "rmsnorm",
        "norm_eps": config.rms_norm_eps,
        "activation": activation,
        "activation_threshold": threshold,
        "gated": True,
        "positions": "rope",
        "rope": read_rope(config, layer_type),
        "tied_embeddings": config.tie_word_embeddings,
        "window": window,
        "window_layers": window_layers,
    }
    return ModelSpec(**(fields | differences))


def _max_seqlen(config: Any, layer_type: str | None) -> int:
    """The longest text whose tokens are all rotated with the same frequencies."""
    trained = trained_positions(config, layer_type)
    if changes_beyond(config, layer_type):
        warnings.warn(
            f"texts are limited to {trained} tokens (max_position_embeddings in config.json): the frequencies that "
            "the RoPE scaling 'dynamic' has for longer ones are not supported",
            stacklevel=5,
        )
    limit = position_limit(config, layer_type)
    if limit is None or limit >= trained:
        return trained
    warnings.warn(
        f"texts are limited to {limit} tokens (original_max_position_embeddings in config.json) instead of "
        f"{trained}: what the model does with longer ones is not supported",
        stacklevel=5,
    )
    return limit


def _window(config: Any, max_seqlen: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and its layers; None and no layers if every token of a text sees all earlier ones."""
    # Classes without these fields ignore them. Without types, all layers have the window.
    types = (config.layer_types or []) if declares(config, "layer_types") else []
    if unknown := set(types) - {"full_attention", WINDOW}:
        raise UserError(f"{min(unknown)} layers are not supported", "use a model whose layers attend to all tokens")
    window: int | None = config.sliding_window if declares(config, "sliding_window") else None
    if window is None and WINDOW in types:
        raise UserError("config.json has layers with a sliding window, and no sliding_window", "correct it there")
    if window is None or window >= max_seqlen:
        return None, ()
    layers = tuple(layer for layer in range(config.num_hidden_layers) if not types or types[layer] == WINDOW)
    return (window, layers) if layers else (None, ())


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Llama checkpoint."""
    return llama_sources(spec, spec.head_dim)


def llama_sources(spec: ModelSpec, rotated: int) -> dict[str, Source]:
    """Map canonical names to sources in a checkpoint whose tensors have Llama's names.

    Args:
        rotated: how many dimensions of a head are rotated.
    """
    found = {
        "embed_tokens.weight": Source("embed_tokens.weight"),
        "final_norm.weight": Source("norm.weight"),
    }
    if not spec.tied_embeddings:
        found["lm_head.weight"] = Source("lm_head.weight")
    for i in range(spec.n_layers):
        found |= _layer_sources(spec, f"layers.{i}", rotated)
    return found


def _layer_sources(spec: ModelSpec, place: str, rotated: int) -> dict[str, Source]:
    order = rotated_first(spec.head_dim, rotated)
    biased = dict.fromkeys(("q_proj", "k_proj", "v_proj"), spec.qkv_bias) | {"o_proj": spec.o_bias}
    biased |= dict.fromkeys(MLP, spec.mlp_bias)
    found = {
        f"{place}.input_norm.weight": Source(f"{place}.input_layernorm.weight"),
        f"{place}.post_norm.weight": Source(f"{place}.post_attention_layernorm.weight"),
    }
    for name in ("q_norm", "k_norm") if spec.qk_norm else ():
        found[f"{place}.{name}.weight"] = Source(f"{place}.self_attn.{name}.weight", order=order)
    for name, bias in biased.items():
        theirs = f"{place}.{'mlp' if name in MLP else 'self_attn'}.{name}"
        reordered = order if name in ("q_proj", "k_proj") else None
        transposed = name in ("o_proj", "down_proj")
        found[f"{place}.{name}.weight"] = Source(f"{theirs}.weight", transpose=transposed, order=reordered)
        if bias:
            found[f"{place}.{name}.bias"] = Source(f"{theirs}.bias", order=reordered)
    return found
