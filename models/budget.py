"""Budgets: which fraction of a sparse layer stays active."""

from __future__ import annotations

from dataclasses import dataclass

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Budget:
    """Fractions of each sparse layer that stay active.

    Raises:
        UserError: a fraction outside (0, 1].
    """

    neurons: float = 1.0
    heads: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("neuron", self.neurons), ("head", self.heads)):
            if not 0 < value <= 1:
                raise UserError(
                    f"the {name} budget {value} is not a fraction in (0, 1]", "0.5 keeps half; 1 keeps everything"
                )

    def counts(self, spec: ModelSpec) -> tuple[int, int]:
        """Active heads and neurons of a layer, at least one each."""
        return max(1, round(self.heads * spec.n_heads)), max(1, round(self.neurons * spec.intermediate_size))
