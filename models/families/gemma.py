"""Gemma: Llama with 1 added to the weights of norms, and with scaled embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families.factors import Factors
from shadowllm.models.families.llama import llama_like, llama_sources
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``GemmaConfig``.

    Raises:
        UserError: attention goes in both directions, or as `llama_like` does.
    """
    if config.use_bidirectional_attention:
        raise UserError("Gemma with attention in both directions is not supported", "use a model that generates text")
    found = llama_like(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias)
    return replace(found, norm_eps=_factors(config).norm_eps(found.norm_eps))


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Gemma checkpoint."""
    return _factors(config).scaled(spec, with_one_added(llama_sources(spec, spec.head_dim)))


def with_one_added(sources: dict[str, Source]) -> dict[str, Source]:
    """Add 1 to the weights of all norms."""
    return {
        name: replace(source, shift=1.0) if name.endswith("norm.weight") else source for name, source in sources.items()
    }


def _factors(config: Any) -> Factors:
    return Factors(math.sqrt(config.hidden_size))
