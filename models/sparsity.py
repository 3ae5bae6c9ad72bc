"""What sparsity is: the units that are left out, the layers that leave them out, and how many each keeps.

Where heads and neurons stand side by side, heads come first.
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
    """How many units of each kind a layer has: query heads and neurons."""
    return {"heads": spec.n_heads, "neurons": spec.intermediate_size}


@dataclass(frozen=True)
class SparseLayers:
    """The layers of a model that leave out units: all that come after its leading, dense ones.

    Tensors that have a row for each of them are said to be ``(n_sparse, ...)``.

    Attributes:
        spec: the model.
        dense_layers: leading layers that stay dense; all of them for a dense model.
    """

    spec: ModelSpec
    dense_layers: int

    @property
    def count(self) -> int:
        """How many there are, ``n_sparse``."""
        return self.spec.n_layers - self.dense_layers

    @property
    def layers(self) -> range:
        """Their numbers in the model."""
        return range(self.dense_layers, self.spec.n_layers)

    def row(self, layer: int) -> int:
        """The row that belongs to one of the `layers`."""
        return layer - self.dense_layers

    def layer(self, row: int) -> int:
        """Inverse of `row`."""
        return row + self.dense_layers


@dataclass(frozen=True, eq=False)
class ActiveCounts:
    """How many units each sparse layer keeps, also by the unit's name: ``counts["heads"]``.

    Attributes:
        heads, neurons: int32 ``(n_sparse,)``.
    """

    heads: np.ndarray
    neurons: np.ndarray

    def __getitem__(self, unit: Unit) -> np.ndarray:
        return self.heads if unit == "heads" else self.neurons

    def by_layer(self) -> Iterator[tuple[int, int]]:
        """Heads and neurons of each layer, as Python's own numbers: int32 is too short for bytes."""
        return zip(self.heads.tolist(), self.neurons.tolist(), strict=True)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Fractions that stay active: one for all sparse layers, or one for each of them.

    Raises:
        UserError: a fraction outside (0, 1].
    """

    heads: Fractions = 1.0
    neurons: Fractions = 1.0

    def __post_init__(self) -> None:
        for unit in UNITS:
            value = getattr(self, unit)
            if isinstance(value, list):  # as JSON has it
                value = tuple(value)
                object.__setattr__(self, unit, value)
            for fraction in _each(value):
                if not 0 < fraction <= 1:
                    raise UserError(
                        f"the {unit.removesuffix('s')} budget {fraction} is not a fraction in (0, 1]",
                        "0.5 keeps half; 1 keeps everything",
                    )

    def counts(self, layers: SparseLayers) -> ActiveCounts:
        """What each sparse layer keeps, at least one of each unit.

        Heads are query heads, rounded to whole groups where groups are chosen (``ModelSpec.head_unit``).

        Raises:
            UserError: fractions for another number of layers.
        """
        spec = layers.spec
        heads = _counts(self.heads, spec.n_heads // spec.heads_together, layers.count) * spec.heads_together
        return ActiveCounts(heads, _counts(self.neurons, spec.intermediate_size, layers.count))

    def mean(self) -> Budget:
        """The same fractions on average, for all layers alike."""
        return Budget(heads=float(np.mean(_each(self.heads))), neurons=float(np.mean(_each(self.neurons))))


def parse_fractions(text: str) -> Fractions:
    """Fractions as they stand on a command line: one, or one per sparse layer with commas between them.

    Raises:
        UserError: not numbers in (0, 1].
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
    """For people: "50%", or "50% (20% to 90%, layer by layer)"."""
    each = _each(value)
    spread = f" ({min(each):.0%} to {max(each):.0%}, layer by layer)" if len(set(each)) > 1 else ""
    return f"{np.mean(each):.0%}{spread}"


def _each(value: Fractions) -> tuple[float, ...]:
    return (value,) if isinstance(value, int | float) else tuple(value)


def _counts(value: Fractions, units: int, n_sparse: int) -> np.ndarray:
    if not n_sparse:  # a dense session, which takes a sparse one's budget
        return np.zeros(0, dtype=np.int32)
    each = _each(value)
    if len(each) not in (1, n_sparse):
        raise UserError(
            f"the budget has {len(each)} fractions, the model {n_sparse} sparse layers", "give one, or one per layer"
        )
    return np.broadcast_to(np.maximum(1, np.rint(np.array(each) * units)).astype(np.int32), n_sparse).copy()
