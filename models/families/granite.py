"""Granite: Llama with constant factors, which are multiplied into the weights here.

With e the embedding factor, r the residual, a the attention and l the logits factor, Granite computes::

    x = e * embedding;  x += r * f(norm(x))  for attention and MLP;  logits = table @ final_norm(x) / l

and its attention scores are ``a * q @ k``. A norm does not depend on the size of its input, but for its eps. So
``x / e`` is computed instead: unscaled embeddings, eps / e^2 in every norm, and r / e in the output projections of
attention and MLP. The factor of a goes into q, and 1 / l into the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.families import llama
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source


@dataclass(frozen=True)
class Factors:
    """Constant factors of a model, as in the equations above.

    Raises:
        UserError: a factor is not a positive number.
    """

    embedding: float
    residual: float
    logits: float
    attention: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise UserError(
                    f"unsupported model: its {name} factor is {value!r}", "correct the multipliers in its config.json"
                )

    def norm_eps(self, eps: float) -> float:
        """The eps of the norms of the smaller hidden states."""
        return eps / self.embedding**2

    def scaled(self, spec: ModelSpec, sources: Mapping[str, Source]) -> dict[str, Source]:
        """Multiply the factors into the weights."""
        scales = {
            "o_proj": self.residual / self.embedding,
            "down_proj": self.residual / self.embedding,
            "q_proj": self.attention * math.sqrt(spec.head_dim),
            "final_norm": 1 / self.logits,
        }
        return {
            name: replace(source, scale=source.scale * scales.get(name.split(".")[-2], 1.0))
            for name, source in sources.items()
        }


def factors(config: Any) -> Factors:
    """Read the factors of a ``GraniteConfig``."""
    return Factors(
        config.embedding_multiplier, config.residual_multiplier, config.logits_scaling, config.attention_multiplier
    )


def spec(config: Any) -> ModelSpec:
    """Read a Hugging Face ``GraniteConfig``; raises as `llama.spec` and `Factors` do."""
    found = llama.spec(config)
    return replace(found, norm_eps=factors(config).norm_eps(found.norm_eps))


def sources(spec: ModelSpec, config: Any) -> dict[str, Source]:
    """Map each canonical tensor name to its source in a Hugging Face Granite checkpoint."""
    return factors(config).scaled(spec, llama.sources(spec, config))
