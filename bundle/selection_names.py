"""Names of a selection's tensors, shared by graphs, engines and sessions: ``neuron_indices`` and others.

A selection holds the active heads and neurons of the sparse layers in one step. For each of the two kinds it has
indices, int32 ``(n_sparse, n_units)``, ascending and -1 past the count, and counts, int32 ``(n_sparse,)``.
"""

from __future__ import annotations

from shadowllm.models.sparsity import UNITS, Unit


def indices(unit: Unit) -> str:
    """Return the name of the indices of all sparse layers."""
    return f"{unit.removesuffix('s')}_indices"


def counts(unit: Unit) -> str:
    """Return the name of the counts of all sparse layers."""
    return f"{unit.removesuffix('s')}_counts"


def of_row(name: str, row: int) -> str:
    """Return the name of one sparse layer's indices or counts as a separate tensor: ``neuron_indices.3``."""
    return f"{name}.{row}"


SELECTION = tuple(name(unit) for unit in UNITS for name in (indices, counts))
# Inputs of ``body`` in a bundle with a low-bit copy of all matrices, int32 ``()``: whether the other units are computed
# from the copy, how many rows of the output table are exact, and whether the largest logit is proved to be exact.
SCALARS = REST, SHORTLIST, CERTIFY = "rest", "shortlist", "certify"
# Output: how many rows of the output table were computed exactly for each row of logits, int32 ``(rows,)``.
RECOMPUTED = "recomputed"
