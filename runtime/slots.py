"""The interface of backends that serve many sequences at once: sequences join and leave a running batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import numpy as np

from shadowllm.models.sparsity import Budget, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.runtime.session import Decodes


class SlotSession(Protocol):
    """A loaded model and a fixed number of slots; each slot holds one sequence with its own budget, or is free.

    Each sequence has its own selection of heads and neurons, and a result does not depend on the sequences in other
    slots. It is a context manager: entering allocates memory, leaving frees it.

    Attributes:
        slots: how many sequences it can hold.
    """

    spec: ModelSpec
    slots: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def join(self, budget: Budget | None = None, length: int = 1) -> int:
        """Start an empty sequence and return its slot.

        Args:
            budget: of its decode steps; None is the bundle's own.
            length: tokens for which memory is reserved; the sequence may become longer.

        Raises:
            UserError: the bundle cannot have this budget.
            MemoryError: there is no memory for this length.
            RuntimeError: all slots are taken.
        """
        ...

    def leave(self, slot: int) -> None:
        """Drop the sequence of a slot; the slot is free again."""
        ...

    def extend(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens of the prompt with a dense step, and return the logits after the last one.

        A long prompt can be given in several parts.

        Returns:
            float32 ``(vocab_size,)``. The next call may overwrite it.

        Raises:
            UserError: no tokens, a token outside the vocabulary, or more tokens than the model has positions.
        """
        ...

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, np.ndarray]:
        """Append one token to each named slot, with one decode step at the budget of each.

        Returns:
            The logits of each named slot, float32 ``(vocab_size,)``. The next call may overwrite them.

        Raises:
            UserError: as `extend`, or a slot without a prompt.
        """
        ...

    def decodes(self, slot: int) -> Decodes:
        """Whether steps of a slot are sparse or dense, at its budget."""
        ...

    def rewind(self, slot: int, length: int) -> None:
        """Keep only the first ``length`` tokens of a slot, see `VerifyingSession.rewind`.

        Raises:
            UserError: the length is below 1, or above the slot's.
        """
        ...

    def verify(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens with one dense step, see `VerifyingSession.verify`.

        Returns:
            The logits after each token, float32 ``(len(tokens), vocab_size)``. The next call may overwrite them.

        Raises:
            UserError: as `extend`.
        """
        ...

    def length(self, slot: int) -> int:
        """The number of tokens of a slot's sequence."""
        ...

    def selection(self, slot: int) -> Mapping[Unit, np.ndarray] | None:
        """Active indices of a slot's last step, by unit, int32 ``(n_sparse, n_units)``, padded with -1.

        None if its last step was dense.
        """
        ...
