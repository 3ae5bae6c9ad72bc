"""Granite: Llama with constant factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shadowllm.models.families import llama
from shadowllm.models.families.factors import Factors
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``GraniteConfig``; raises as `llama.spec` and `Factors` do."""
    found = llama.spec(config)
    return replace(found, norm_eps=_factors(config).norm_eps(found.norm_eps))


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Granite checkpoint."""
    return _factors(config).scaled(spec, llama.sources(spec, config))


def _factors(config: Any) -> Factors:
    return Factors(
        config.embedding_multiplier, config.residual_multiplier, config.logits_scaling, config.attention_multiplier
    )
