"""Sparsity: the units that can be skipped, the sparse layers, and how many units each layer keeps.

Where heads and neurons appear together, heads come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec

Unit = Literal["heads", "neurons"]
UNITS: tuple[Unit, ...] = ("heads", "neurons")
Fractions = float | tuple[float, ...]


def layer_units(spec: ModelSpec) -> dict[Unit, int]:
    """Return how many units of each kind a layer has: query heads and neurons."""
    return {"heads": spec.n_heads, "neurons": spec.intermediate_size}


@dataclass(frozen=True)
class SparseLayers:
    """The layers of a model that skip units: all layers after the leading dense layers.

    A tensor with one row per sparse layer has the shape ``(n_sparse, ...)``.

    Attributes:
        spec: the model.
        dense_layers: number of leading layers that stay dense; all layers for a dense model.
    """

    spec: ModelSpec
    dense_layers: int

    @property
    def count(self) -> int:
        """Number of sparse layers, ``n_sparse``."""
        return self.spec.n_layers - self.dense_layers

    @property
    def layers(self) -> range:
        """Indices of the sparse layers in the model."""
        return range(self.dense_layers, self.spec.n_layers)

    def row(self, layer: int) -> int:
        """Return the row of one of the `layers`."""
        return layer - self.dense_layers

    def layer(self, row: int) -> int:
        """Return the layer of a row."""
        return row + self.dense_layers


@dataclass(frozen=True, eq=False)
class ActiveCounts:
    """How many units each sparse layer keeps. ``counts["heads"]`` works too.

    Attributes:
        heads, neurons: int32 ``(n_sparse,)``.
    """

    heads: np.ndarray
    neurons: np.ndarray

    def __getitem__(self, unit: Unit) -> np.ndarray:
        return self.heads if unit == "heads" else self.neurons

    def by_layer(self) -> Iterator[tuple[int, int]]:
        """Return heads and neurons of each layer as Python ints, because byte counts overflow int32."""
        return zip(self.heads.tolist(), self.neurons.tolist(), strict=True)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Fractions of units that stay active: one for all sparse layers, or one per sparse layer.

    Raises:
        UserError: a fraction is outside (0, 1].
    """

    heads: Fractions = 1.0
    neurons: Fractions = 1.0

    def __post_init__(self) -> None:
        for unit in UNITS:
            value = getattr(self, unit)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, unit, value)
            for fraction in _each(value):
                if not 0 < fraction <= 1:
                    raise UserError(
                        f"the {unit.removesuffix('s')} budget {fraction} is not a fraction in (0, 1]",
                        "0.5 keeps half; 1 keeps everything",
                    )

    def counts(self, layers: SparseLayers) -> ActiveCounts:
        """Return how many units each sparse layer keeps, at least one of each kind.

        Heads are query heads. If whole groups are selected (``ModelSpec.head_unit``), they are rounded to groups.

        Raises:
            UserError: the fractions are for another number of layers.
        """
        spec = layers.spec
        heads = _counts(self.heads, spec.n_heads // spec.heads_together, layers.count) * spec.heads_together
        return ActiveCounts(heads, _counts(self.neurons, spec.intermediate_size, layers.count))

    def mean(self) -> Budget:
        """Return the mean fractions, equal for all layers."""
        return Budget(heads=float(np.mean(_each(self.heads))), neurons=float(np.mean(_each(self.neurons))))


def parse_fractions(text: str) -> Fractions:
    """Parse fractions from the command line: one, or one per sparse layer, separated by commas.

    Raises:
        UserError: they are not numbers in (0, 1].
    """
    try:
        values = tuple(float(part) for part in text.split(","))
        Budget(neurons=values)
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
    """Describe fractions in words: "50%", or "50% (20% to 90%, layer by layer)"."""
    each = _each(value)
    spread = f" ({min(each):.0%} to {max(each):.0%}, layer by layer)" if len(set(each)) > 1 else ""
    return f"{np.mean(each):.0%}{spread}"


def _each(value: Fractions) -> tuple[float, ...]:
    return (value,) if isinstance(value, int | float) else tuple(value)


def _counts(value: Fractions, units: int, n_sparse: int) -> np.ndarray:
    if not n_sparse:  # a dense session accepts the budget of a sparse one
        return np.zeros(0, dtype=np.int32)
    each = _each(value)
    if len(each) not in (1, n_sparse):
        raise UserError(
            f"the budget has {len(each)} fractions, the model {n_sparse} sparse layers", "give one, or one per layer"
        )
    return np.broadcast_to(np.maximum(1, np.rint(np.array(each) * units)).astype(np.int32), n_sparse).copy()
