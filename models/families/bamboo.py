"""Bamboo and TurboSparse-Mistral (Song et al., arXiv 2406.05955): Mistral with a ReLU of gate and of up.

``transformers`` has no code for it. Its config is read as Mistral's (see `files.config.RELATIVES`). The config names
the activation "relu", and the model's own code applies it twice.
"""

from __future__ import annotations

from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families.llama import llama_like
from shadowllm.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Read a ``config.json`` of Bamboo.

    Raises:
        UserError: the activation is missing or another one, or as `llama_like` does.
    """
    if config.hidden_act not in ("relu", "drelu"):
        said = f"says {config.hidden_act!r}" if config.hidden_act else "does not give it"
        raise UserError(
            f"Bamboo needs the activation 'relu' (hidden_act), and config.json {said}",
            "correct it there, or give --activation relu",
        )
    config.hidden_act = "drelu"
    return llama_like(config)
