"""Constant factors of a model, which are multiplied into its weights.

With the factors e of the embeddings, r of the residual, a of the attention and l of the logits, a model computes::

    x = e * embedding;  x += r * f(norm(x))  for attention and MLP;  logits = table @ final_norm(x) / l

and its attention scores are ``a * q @ k``. A norm does not depend on the size of its input, but for its eps. So
``x / e`` is computed instead: unscaled embeddings, eps / e^2 in every norm, and r / e in the output projections of
attention and MLP. The factor of a goes into q, and 1 / l into the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source

LARGEST = 1e30  # whose square is still a number


@dataclass(frozen=True)
class Factors:
    """Constant factors, as in the equations above.

    Attributes:
        attention: factor of the attention scores; None for the usual ``1 / sqrt(head_dim)``.

    Raises:
        UserError: a factor is not a positive number.
    """

    embedding: float
    residual: float = 1.0
    logits: float = 1.0
    attention: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (isinstance(value, int | float) and 0 < value < LARGEST):
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
            "q_proj": self.attention * math.sqrt(spec.head_dim) if self.attention else 1.0,
            "final_norm": 1 / self.logits,
        }
        return {
            name: replace(source, scale=source.scale * scales.get(name.split(".")[-2], 1.0))
            for name, source in sources.items()
        }
