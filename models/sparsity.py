"""Budgets: which fraction of the sparse layers stays active."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec

Fractions = float | tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """Fractions that stay active: one for all sparse layers, or one for each of them.

    Raises:
        UserError: a fraction outside (0, 1].
    """

    neurons: Fractions = 1.0
    heads: Fractions = 1.0

    def __post_init__(self) -> None:
        for name in ("neurons", "heads"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                value = tuple(value)
                object.__setattr__(self, name, value)
            for fraction in _each(value):
                if not 0 < fraction <= 1:
                    raise UserError(
                        f"the {name.removesuffix('s')} budget {fraction} is not a fraction in (0, 1]",
                        "0.5 keeps half; 1 keeps everything",
                    )

    def counts(self, spec: ModelSpec, n_sparse: int) -> tuple[np.ndarray, np.ndarray]:
        """Active heads and neurons of each sparse layer, int32 ``(n_sparse,)``, at least one each.

        Heads are query heads, rounded to whole groups where groups are chosen (``ModelSpec.head_unit``).

        Raises:
            UserError: fractions for another number of layers.
        """
        heads = _counts(self.heads, spec.n_heads // spec.heads_together, n_sparse) * spec.heads_together
        return heads, _counts(self.neurons, spec.intermediate_size, n_sparse)

    def mean(self) -> Budget:
        """The same fractions on average, for all layers alike."""
        return Budget(*(float(np.mean(_each(value))) for value in (self.neurons, self.heads)))


def parse_fractions(text: str) -> Fractions:
    """Fractions as they stand on a command line: one, or one per sparse layer with commas between them.

    Raises:
        UserError: not numbers in (0, 1].
    """
    try:
        values = tuple(float(part) for part in text.split(","))
        Budget(values)
    except (ValueError, UserError):
        raise UserError(
            f"the budget {text!r} is not a fraction in (0, 1]",
            "0.5 keeps half, 1 keeps everything; one per sparse layer with commas between them works too",
        ) from None
    return values[0] if len(values) == 1 else values


def format_fractions(value: Fractions) -> str:
    """Inverse of `parse_fractions`."""
    return ",".join(map(str, _each(value)))


def describe_fractions(value: Fractions) -> str:
    """For people: "50%", or "50% (20% to 90%, layer by layer)"."""
    each = _each(value)
    spread = f" ({min(each):.0%} to {max(each):.0%}, layer by layer)" if len(set(each)) > 1 else ""
    return f"{np.mean(each):.0%}{spread}"


def _each(value: Fractions) -> tuple[float, ...]:
    return (value,) if isinstance(value, int | float) else tuple(value)


def _counts(value: Fractions, units: int, n_sparse: int) -> np.ndarray:
    each = _each(value)
    if len(each) not in (1, n_sparse):
        raise UserError(
            f"the budget has {len(each)} fractions, the model {n_sparse} sparse layers", "give one, or one per layer"
        )
    return np.broadcast_to(np.maximum(1, np.rint(np.array(each) * units)).astype(np.int32), n_sparse).copy()
