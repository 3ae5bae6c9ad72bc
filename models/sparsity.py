"""Sparsity: the units that are selected, the sparse layers, and how many units each layer keeps.

Where heads and neurons appear together, heads come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST, check_kind, check_switch
from shadowllm.models.spec import ModelSpec

Unit = Literal["heads", "neurons"]
UNITS: tuple[Unit, ...] = ("heads", "neurons")
Fractions = float | tuple[float, ...]
# Units that are not active are computed from the low-bit copy ("shadow"), or contribute nothing ("drop").
Rest = Literal["shadow", "drop"]


def layer_units(spec: ModelSpec) -> dict[Unit, int]:
    """Return how many units of each kind a layer has: query heads and neurons."""
    return {"heads": spec.n_heads, "neurons": spec.intermediate_size}


@dataclass(frozen=True)
class SparseLayers:
    """The layers of a model that select units: all layers after the leading dense layers.

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
    """How much of a model a token reads at full precision. The default is everything: the dense model.

    Attributes:
        heads, neurons: fractions of units that are active: one for all sparse layers, or one per sparse layer.
        shortlist: rows of the output table that are computed exactly, those with the largest logits in the low-bit
            copy. The other logits are the copy's. None computes all rows exactly.
        certify: whether more rows are computed exactly, until the largest logit is proved to be that of the whole
            table. How many are needed depends on the token. Without a shortlist all rows are exact, and this has no
            effect.
        rest: what the other heads and neurons contribute. None is "shadow" if the bundle has a low-bit copy of all
            matrices, else "drop".

    Raises:
        UserError: a fraction is outside (0, 1], the shortlist is empty or above `LARGEST`, ``rest`` is unknown, or
            ``certify`` is neither True nor False.
    """

    heads: Fractions = 1.0
    neurons: Fractions = 1.0
    shortlist: int | None = None
    rest: Rest | None = None
    certify: bool = False

    def __post_init__(self) -> None:
        if self.shortlist is not None and (not isinstance(self.shortlist, Integral) or self.shortlist is True):
            raise UserError(
                f"a shortlist of {self.shortlist!r} rows is no number of rows",
                "give a whole number, or None for all rows",
            )
        if self.shortlist is not None and self.shortlist < 1:
            raise UserError(f"a shortlist of {self.shortlist} rows is empty", "give 1 or more; 1024 is usual")
        if self.shortlist is not None and self.shortlist > LARGEST:
            raise UserError(f"a shortlist of {self.shortlist} rows is too large", f"give at most {LARGEST}")
        if self.shortlist is not None:
            object.__setattr__(self, "shortlist", int(self.shortlist))  # JSON has no numbers of NumPy
        check_switch("certify", self.certify)
        if self.rest not in (None, *get_args(Rest)):
            raise UserError(f"unknown rest {self.rest!r}", f"use {' or '.join(get_args(Rest))}")
        for unit in UNITS:
            value = getattr(self, unit)
            if not isinstance(value, float | int | tuple):  # JSON has no tuples, and NumPy has numbers of its own
                plain = value if isinstance(value, list) else np.asarray(value).tolist()
                value = tuple(plain) if isinstance(plain, list) else plain
                object.__setattr__(self, unit, value)
            for fraction in _each(value):
                if not isinstance(fraction, Real) or isinstance(fraction, bool) or not 0 < fraction <= 1:
                    raise UserError(
                        f"the {unit.removesuffix('s')} budget {fraction!r} is not a fraction in (0, 1]",
                        "0.5 keeps half; 1 keeps everything",
                    )
            plain = tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
            object.__setattr__(self, unit, plain)

    def counts(self, layers: SparseLayers) -> ActiveCounts:
        """Return how many units each sparse layer keeps, at least one of each kind.

        Heads are query heads. If whole groups are selected (``ModelSpec.head_unit``), they are rounded to groups.

        Raises:
            UserError: the fractions are for another number of layers.
        """
        spec = layers.spec
        heads = _counts(self.heads, spec.n_heads // spec.heads_together, layers.count) * spec.heads_together
        return ActiveCounts(heads, _counts(self.neurons, spec.intermediate_size, layers.count))

    def rest_with(self, copies: bool) -> Rest:
        """Return what the units that are not active contribute.

        Args:
            copies: whether there is a low-bit copy of all matrices.

        Raises:
            UserError: the budget needs this copy, and there is none.
        """
        if not copies and (self.rest == "shadow" or self.shortlist is not None):
            needs = "computes the rest from the low-bit copy" if self.rest == "shadow" else "has a shortlist"
            raise UserError(
                f"the budget {needs}, but there is no low-bit copy for that",
                "leave it out, or export with --rest shadow and with floats, int8 or int6, not int4",
            )
        return self.rest or ("shadow" if copies else "drop")

    def mean(self) -> Budget:
        """Return the mean fractions, equal for all layers."""
        return replace(self, heads=float(np.mean(_each(self.heads))), neurons=float(np.mean(_each(self.neurons))))


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
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _counts(value: Fractions, units: int, n_sparse: int) -> np.ndarray:
    if not n_sparse:  # a dense session accepts the budget of a sparse one
        return np.zeros(0, dtype=np.int32)
    each = _each(value)
    if len(each) not in (1, n_sparse):
        raise UserError(
            f"the budget has {len(each)} fractions, the model {n_sparse} sparse layers", "give one, or one per layer"
        )
    return np.broadcast_to(np.maximum(1, np.rint(np.array(each) * units)).astype(np.int32), n_sparse).copy()


def check_neuron_budget(kind: str, budget: Budget) -> None:
    """Refuse a budget of neurons where the ReLU decides which neurons are computed.

    Raises:
        UserError: the predictor is of the kind "relu", and the budget leaves out neurons.
    """
    if kind == "relu" and np.min(budget.neurons) < 1:
        raise UserError(
            "a neuron budget below 1, but the selector relu computes every neuron that fires", "leave it out"
        )


def _plain(fraction: float) -> float:
    """A number that JSON has."""
    return fraction if type(fraction) in (int, float) else float(fraction)


def check_budget(budget: Budget) -> Budget:
    """Return a budget after checking its type.

    Raises:
        UserError: it is something else, for example a number.
    """
    return check_kind("the budget", budget, Budget, "Budget(neurons=0.5)")
