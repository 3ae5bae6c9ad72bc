"""Bamboo and TurboSparse-Mistral (Song et al., arXiv 2406.05955): Mistral with a ReLU of gate and of up.

``transformers`` has no code for it. Its config is read as Mistral's (see `files.config.RELATIVES`). The config names
the activation "relu", and the model's own code applies it twice.
"""

from __future__ import annotations

from typing import Any

from shadowllm.models.families.llama import llama_like
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a ``config.json`` of Bamboo; raises as `llama_like` does."""
    if config.hidden_act == "relu":
        config.hidden_act = "drelu"
    return llama_like(config)
