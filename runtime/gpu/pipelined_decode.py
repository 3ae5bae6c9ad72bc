"""Decoding with replays of one step; later steps are launched before the results of earlier ones arrive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shadowllm.runtime.inputs import check_rewind

# Steps launched beyond the one that is waited for: enough that the GPU never waits for Python.
AHEAD = 4
SLOTS = AHEAD + 1  # host copies of tokens, one for each launched step


class PipelinedDecode(ABC):
    """The decode methods of a session whose steps continue on the device, without the host.

    ``_replay`` launches a step. ``_lengths`` is the number of tokens of each sequence, int64 ``(batch,)``.
    ``_budgets_set`` counts the calls of `Session.set_budget`.
    """

    _lengths: np.ndarray
    _replay: Callable[[], Any]
    _budgets_set = 0
    step_seconds = None  # a step is one launch, so its parts cannot be timed
    fired = None  # not copied from the device
    recomputed = None  # stays on the device

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._start(tokens, 1)
        self._replay()
        self._lengths += 1
        return self._fetched()

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """See `Session.decode_greedy`."""
        self._start(tokens, steps)
        return self._ahead(tokens, steps, self._replay)

    def _ahead(self, tokens: np.ndarray, steps: int, replay: Callable[[], Any]) -> Iterator[np.ndarray]:
        launched, budget = 0, self._budgets_set
        for done in range(steps):
            if budget != self._budgets_set:
                # Drop the steps launched with the old budget; new steps overwrite what they wrote to the cache.
                for step in range(done, launched):
                    self._received(step % SLOTS)
                # A sequence that has ended may have -1, see `SamplingSession`.
                self._start(np.maximum(tokens, 0), steps - done)
                launched, budget = done, self._budgets_set
            while launched < min(steps, done + SLOTS):
                replay()
                self._send(launched % SLOTS)
                launched += 1
            tokens = self._received(done % SLOTS)
            self._lengths += 1  # later launched steps wrote past this length, where nothing reads
            yield tokens

    def rewind(self, lengths: np.ndarray) -> None:
        """See `VerifyingSession.rewind`."""
        self._lengths = check_rewind(lengths, self._lengths)

    @abstractmethod
    def _start(self, tokens: np.ndarray, steps: int) -> None:
        """Check that the steps are possible, and write the first step's tokens and positions to the device."""

    @abstractmethod
    def _send(self, slot: int) -> None:
        """Start to copy the picked tokens to one of `SLOTS` slots on the host; does not wait."""

    @abstractmethod
    def _received(self, slot: int) -> np.ndarray:
        """Wait for a slot and return a copy of its tokens, int64 ``(batch,)``."""

    @abstractmethod
    def _fetched(self) -> np.ndarray:
        """Wait for the step and return its logits, float32 ``(batch, vocab_size)``."""
