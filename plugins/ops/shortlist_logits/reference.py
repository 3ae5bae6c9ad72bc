"""The NumPy reference of ``ShortlistLogits``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import copy_rows, full_rows, largest


def shortlist_logits(
    x: np.ndarray,
    table: np.ndarray,
    copy: np.ndarray,
    scales: np.ndarray,
    errors: np.ndarray,
    shortlist: int | np.ndarray,
    certify: int | np.ndarray,
    weighting: np.ndarray | None = None,
    table_scales: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``ShortlistLogits``: x ``(R, D)``, table ``(V, D)`` -> float32 ``(R, V)``, int32 ``(R,)``.

    Args:
        shortlist, certify: ``()`` or ``(R,)``.

    Raises:
        IndexError: a shortlist is negative.
    """
    if np.min(shortlist) < 0:
        raise IndexError(f"shortlist {np.min(shortlist)} is negative")
    wide = x.astype(np.float32)
    exact = wide @ full_rows(table, table_scales, copy, scales, x.shape[1]).T
    low = wide @ copy_rows(copy, scales, x.shape[1]).T
    norms = np.linalg.norm((wide if weighting is None else wide * weighting).astype(np.float64), axis=1)
    recomputed = np.zeros(exact.shape, dtype=bool)
    wanted, proved = (np.broadcast_to(given, len(x)) for given in (shortlist, certify))
    for row, marks in enumerate(recomputed):
        marks[largest(low[row], max(wanted[row], 1) if proved[row] else wanted[row])] = True
        if proved[row]:
            marks |= low[row] + errors * norms[row] >= exact[row, marks].max()
    return np.where(recomputed, exact, low), recomputed.sum(axis=1, dtype=np.int32)
