"""MiniCPM and MiniCPM-S (Hu et al., arXiv 2404.06395): Llama with constant factors.

``transformers`` has no code for it. Its config is read as Llama's (see `files.config.RELATIVES`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families.factors import Factors
from shadowllm.models.families.llama import llama_like, llama_sources
from shadowllm.models.rope import is_positive
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source


def spec(config: Any) -> ModelSpec:
    """Read a ``config.json`` of MiniCPM.

    Raises:
        UserError: the model is a variant that this adapter does not support, a factor is missing or not usable, or as
            `llama_like` does.
    """
    _refuse_variants(config)
    bias = bool(getattr(config, "attention_bias", False))
    found = llama_like(config, qkv_bias=bias, o_bias=bias)
    return replace(found, norm_eps=_factors(config).norm_eps(found.norm_eps))


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a MiniCPM checkpoint, whose tensors have Llama's names."""
    return _factors(config).scaled(spec, llama_sources(spec, spec.head_dim))


def _refuse_variants(config: Any) -> None:
    if getattr(config, "sparse_config", None):
        raise UserError(
            "config.json asks for attention to selected blocks (sparse_config, InfLLM v2), which is not supported",
            "remove it there: the model then attends to all tokens, as it does in short texts",
        )
    if getattr(config, "num_experts", None):
        raise UserError("mixtures of experts (num_experts) are not supported", "use a MiniCPM model without experts")
    if not getattr(config, "use_mup", True):
        raise UserError("MiniCPM without its constant factors (use_mup) is not supported", "use a model with them")
    if getattr(config, "qk_norm", False):
        raise UserError("MiniCPM with norms of queries and keys (qk_norm) is not supported", "use a model without them")
    size, channels = config.hidden_size // config.num_attention_heads, getattr(config, "kv_channels", None)
    if channels not in (None, size):
        raise UserError(
            f"config.json says that heads have {channels!r} dimensions (kv_channels), and only {size} "
            "(hidden_size / num_attention_heads) are supported",
            "use a model with heads of that size",
        )


def _factors(config: Any) -> Factors:
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        value = getattr(config, name, None)
        if value is None:
            raise UserError(f"MiniCPM needs {name}", "config.json does not give it: correct it there")
        if not is_positive(value):
            raise UserError(f"{name} is {value!r}, and must be a positive number", "correct it in config.json")
    residual = config.scale_depth / math.sqrt(config.num_hidden_layers)
    return Factors(config.scale_emb, residual, config.hidden_size / config.dim_model_base)
