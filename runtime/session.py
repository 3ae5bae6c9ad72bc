"""The interfaces of the backends: prefill prompts, decode token by token, change the budget, verify drafts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

import numpy as np

from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec

if TYPE_CHECKING:
    from shadowllm.runtime.generation.sampling import Sampling

Decodes = Literal["sparse", "dense"]
Prefill = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Memory:
    """Device memory in bytes.

    Attributes:
        weights: weights of the engines; prefill and decode share them.
        cache: the KV cache.
        activations: all other buffers of the session.
        workspace: scratch memory, which all engines share because they run one after the other.
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

    It is a context manager: entering allocates memory, leaving frees it. All sequences of a batch advance together.
    Each has its own selection of heads and neurons per step, but on a GPU they share one.
    """

    spec: ModelSpec

    @property
    def decodes(self) -> Decodes:
        """Whether a decode step is sparse or dense at the current budget."""
        ...

    @property
    def recomputed(self) -> np.ndarray | None:
        """Rows of the output table that the last sparse step computed exactly, ``(batch,)``; None if it is not known.

        They are the shortlist, and those that a certificate needs.
        """
        ...

    @property
    def memory(self) -> Memory | None:
        """Device memory in use since `reset`; None if it is not known."""
        ...

    @property
    def step_seconds(self) -> Mapping[str, float] | None:
        """Seconds of each part of the last decode step, by name; None if they are not measured."""
        ...

    @property
    def fired(self) -> Sequence[float] | None:
        """Share of the neurons of each sparse layer that fired in the last step, with the selector relu.

        It is the mean of the sequences. None with other selectors, after a dense step or a prompt, and if the shares
        are not known.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def reset(self, batch: int = 1) -> None:
        """Drop all sequences and allocate memory for ``batch`` new ones.

        Raises:
            UserError: a session cannot hold this number of sequences.
        """
        ...

    def set_budget(self, budget: Budget) -> None:
        """Set the fractions to keep, from the next step on; no shape, graph or engine changes."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts (dense) and return the logits after each, float32 ``(batch, vocab_size)``.

        Raises:
            UserError: the number of prompts is not the ``batch`` of `reset`, a prompt is empty, a token is outside
                the vocabulary, or a prompt has more tokens than the model has positions.
        """
        ...

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per sequence, int64 ``(batch,)``, and return the logits, float32 ``(batch, vocab_size)``.

        The next call may overwrite the returned array.
        """
        ...

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray] | None:
        """Append ``tokens``, then the most probable tokens: ``steps`` tokens per sequence in total.

        The logits stay on the device, so the caller cannot check them for NaN as those of `decode`.

        Returns:
            An iterator over the most probable next tokens after each step, int64 ``(batch,)``. The last tokens
            yielded are not appended. If the caller stops early, the session has only the steps up to there.
            None if the session needs the host in every step. Then nothing is done, and the caller uses `decode`.

        Raises:
            UserError: as `decode`, or more steps than the model has positions.
        """
        ...


@runtime_checkable
class SamplingSession(Session, Protocol):
    """A session that can also draw tokens on its device."""

    def decode_sampled(
        self, tokens: np.ndarray, steps: int, sampling: Sampling, uniforms: np.ndarray
    ) -> Iterator[np.ndarray] | None:
        """As `decode_greedy`, with tokens drawn by temperature, top-k, top-p and min-p.

        A token is -1 if its logits are NaN or infinite.

        Args:
            sampling: its other options are not read.
            uniforms: a random number in [0, 1) for each token to draw, float32 ``(batch, steps)``.
        """
        ...


@runtime_checkable
class VerifyingSession(Session, Protocol):
    """A session that can also run dense steps over several tokens, and set each sequence back.

    Attributes:
        longest_draft: `verify` takes at most one token more than this.
    """

    longest_draft: int

    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """Append one or more tokens per sequence, int64 ``(batch, seqlen)``, with one dense step.

        The step writes the cache entries of its positions. So after `rewind` it replaces those of sparse steps, and
        the cache is that of a dense session.

        Returns:
            The logits after each token, float32 ``(batch, seqlen, vocab_size)``. The next call may overwrite them.

        Raises:
            UserError: as `decode`, fewer free positions than tokens, or more tokens than this session can verify.
        """
        ...

    def rewind(self, lengths: np.ndarray) -> None:
        """Keep only the first ``lengths`` tokens of each sequence, int64 ``(batch,)``.

        Nothing is copied: a token attends to positions up to its own, so entries after it are not visible, and
        later steps overwrite them.

        Raises:
            UserError: a length is below 1, or above the number of tokens of its sequence.
        """
        ...
