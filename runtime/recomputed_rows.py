"""How many rows of the output table decode steps compute exactly: the shortlist, and what a certificate needs."""

from __future__ import annotations

import numpy as np

from shadowllm.models.sparsity import Budget


class RecomputedRows:
    """Collects the numbers of rows over the steps of a session or the positions of a text.

    Args:
        budget: the budget of these steps.
    """

    def __init__(self, budget: Budget) -> None:
        self._shortlist = budget.shortlist
        self._counts: list[np.ndarray] = []

    def add(self, counts: np.ndarray | None) -> None:
        """Add `Session.recomputed` of a step; nothing if it is None, or if the budget has no shortlist."""
        if counts is not None and self._shortlist is not None:
            self._counts.append(counts.flatten())

    def summary(self) -> dict[str, float]:
        """Return the mean and how often more than the shortlist was needed; empty if nothing was added.

        Returns:
            ``mean``, rows per step and sequence, and ``fallback_share``, the share of these steps in which the
            certificate needed rows outside of the shortlist.
        """
        if not self._counts:
            return {}
        counts = np.concatenate(self._counts)
        return {"mean": float(counts.mean()), "fallback_share": float((counts > self._shortlist).mean())}
