"""Names of the tensors of a selection, by which graphs, engines and sessions agree: ``neuron_indices`` and the like.

A selection is what the sparse layers use in one step. As tensors it is, for heads and for neurons, the indices of
the active ones, int32 ``(n_sparse, n_units)``, ascending and -1 past the count, and the counts, int32 ``(n_sparse,)``.
"""

from __future__ import annotations

from shadowllm.models.sparsity import UNITS, Unit


def indices(unit: Unit) -> str:
    """Indices of all sparse layers."""
    return f"{unit.removesuffix('s')}_indices"


def counts(unit: Unit) -> str:
    """Counts of all sparse layers."""
    return f"{unit.removesuffix('s')}_counts"


def of_row(name: str, row: int) -> str:
    """One sparse layer's row of indices or counts, where it is a tensor of its own: ``neuron_indices.3``."""
    return f"{name}.{row}"


SELECTION = tuple(name(unit) for unit in UNITS for name in (indices, counts))
