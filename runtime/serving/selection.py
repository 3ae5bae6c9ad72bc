"""A compact form of a step's selection, to send with each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec

BINS = 64  # groups of neighbouring neurons per layer, at most


@dataclass(frozen=True, slots=True)
class SelectionSummary:
    """What each sparse layer computed at full precision, one entry per sparse layer.

    Attributes:
        heads: one character per head, "1" if it is active, else "0".
        neurons: number of active neurons.
        bins: one hexadecimal digit per group of neighbouring neurons: the share of active neurons in it, from 0 (none)
            to f (all); a group with some is never 0. All groups have the same size, but for one neuron.
    """

    heads: list[str]
    neurons: list[int]
    bins: list[str]


def summarise(spec: ModelSpec, selection: Mapping[Unit, np.ndarray]) -> SelectionSummary:
    """Summarise active indices ``(n_sparse, n_units)``, padded with -1."""
    heads, neurons = (_mask(selection[unit], size) for unit, size in _sizes(spec))
    groups = min(BINS, spec.intermediate_size)
    starts = np.arange(groups) * spec.intermediate_size // groups
    sizes = np.diff(starts, append=spec.intermediate_size)
    shares = np.ceil(np.add.reduceat(neurons, starts, axis=1, dtype=np.int64) * 15 / sizes).astype(int)
    return SelectionSummary(
        ["".join("01"[int(active)] for active in layer) for layer in heads],
        neurons.sum(axis=1).tolist(),
        ["".join(f"{share:x}" for share in layer) for layer in shares],
    )


def active_shares(selection: Mapping[Unit, np.ndarray] | None) -> dict[Unit, float]:
    """Return the share of active units over all sparse layers; after a dense step, all of them are."""
    units: tuple[Unit, ...] = ("heads", "neurons")
    return {unit: 1.0 if selection is None else float(np.mean(selection[unit] >= 0)) for unit in units}


def _sizes(spec: ModelSpec) -> tuple[tuple[Unit, int], ...]:
    return ("heads", spec.n_heads), ("neurons", spec.intermediate_size)


def _mask(indices: np.ndarray, size: int) -> np.ndarray:
    """Return bool ``(n_sparse, size)`` from padded indices."""
    mask = np.zeros((len(indices), size + 1), dtype=bool)
    mask[np.arange(len(indices))[:, None], indices] = True  # padding sets the last column
    return mask[:, :size]
