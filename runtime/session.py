"""What every backend offers: prefill a prompt, decode token by token, change the budget in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np

from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec

Decodes = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        weights: of the engines, each once for both of its phases.
        cache: keys and values.
        activations: what else lies in the arena.
        workspace: scratch that all pieces share, for they take turns.
    """

    weights: int
    cache: int
    activations: int
    workspace: int

    def __str__(self) -> str:
        parts = (f"{name} {size / 1e6:.1f} MB" for name, size in vars(self).items())
        return f"device memory: {', '.join(parts)}; {sum(vars(self).values()) / 1e6:.1f} MB in all"


class Session(Protocol):
    """A loaded model and the state of one batch of sequences.

    A context manager: entering allocates, leaving frees. All sequences of a batch advance together
    and share one selection of heads and neurons per step.
    """

    spec: ModelSpec

    @property
    def decodes(self) -> Decodes:
        """Which graphs or layers a decode step runs at the present budget."""
        ...

    @property
    def memory(self) -> Memory | None:
        """What lies on the device since `reset`; None where it is not known."""
        ...

    @property
    def step_seconds(self) -> Mapping[str, float] | None:
        """Seconds of each part of the last decode step, by its name; None where they are not measured."""
        ...

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

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray] | None:
        """Append ``tokens``, then whatever is most probable, ``steps`` tokens per sequence in all.

        The logits stay on the device: unlike those of `decode`, they are not checked for NaN.

        Returns:
            What is most probable next after each step, int64 ``(batch,)``. The last one yielded has not
            been appended. A caller may stop early, and the session stands where it stopped. None where a
            session needs the host in every step: nothing has happened then, and `decode` does the work.

        Raises:
            UserError: as `decode`, or more steps than the model has positions.
        """
        ...
