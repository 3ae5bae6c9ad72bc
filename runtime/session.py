"""What every backend offers: prefill a prompt, decode token by token, change the budget in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np

from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec


class Session(Protocol):
    """A loaded model and the state of one batch of sequences.

    A context manager: entering allocates, leaving frees. All sequences of a batch advance together
    and share one selection of heads and neurons per step.
    """

    spec: ModelSpec

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def reset(self, batch: int = 1) -> None:
        """Forget all sequences and make room for ``batch`` new ones."""
        ...

    def set_budget(self, budget: Budget) -> None:
        """Fractions to keep from the next step on; no shape, graph or engine changes."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts (dense) and return the logits after each, float32 ``(batch, vocab_size)``.

        Raises:
            UserError: another number of prompts than ``reset`` asked for, an empty prompt, a token
                outside the vocabulary, or more tokens than the model has positions.
        """
        ...

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per sequence, int64 ``(batch,)``, and return float32 ``(batch, vocab_size)``.

        The array is the session's own and is overwritten by the next call.
        """
        ...


@runtime_checkable
class Greedy(Session, Protocol):
    """A session that can go on by itself with the most probable tokens, without the host in every step."""

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """Append ``tokens``, then whatever is most probable, ``steps`` tokens per sequence in all.

        The logits stay on the device: unlike those of `Session.decode`, they are not checked for NaN.

        Yields:
            What is most probable next after each step, int64 ``(batch,)``. The last one yielded has not
            been appended. A caller may stop early, and the session stands where it stopped.

        Raises:
            UserError: as `Session.decode`, or more steps than the model has positions.
        """
        ...
