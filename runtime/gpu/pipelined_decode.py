"""Decoding by replays of one step, launched before the results of earlier ones are waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Enough that the GPU never waits for Python.
AHEAD = 4
SLOTS = AHEAD + 1  # tokens on their way to the host


class PipelinedDecode(ABC):
    """The decoding half of a session whose step goes on where the last one ended, without the host.

    ``_replay`` launches a step; ``_lengths`` are the tokens of each sequence, int64 ``(batch,)``; ``_budgets_set``
    counts the calls of `Session.set_budget`.
    """

    _lengths: np.ndarray
    _replay: Callable[[], Any]
    _budgets_set = 0
    step_seconds = None  # a step is one launch: its parts are not timed

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._start(tokens, 1)
        self._replay()
        self._lengths += 1
        return self._fetched()

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """See `Session.decode_greedy`."""
        self._start(tokens, steps)
        return self._ahead(tokens, steps)

    def _ahead(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        launched, budget = 0, self._budgets_set
        for done in range(steps):
            if budget != self._budgets_set:
                # Steps launched under the budget before: taken back, and what they wrote to the cache is overwritten.
                for step in range(done, launched):
                    self._received(step % SLOTS)
                self._start(tokens, steps - done)
                launched, budget = done, self._budgets_set
            while launched < min(steps, done + SLOTS):
                self._replay()
                self._send(launched % SLOTS)
                launched += 1
            tokens = self._received(done % SLOTS)
            self._lengths += 1  # what was launched beyond it stands past the end, where nothing looks
            yield tokens

    @abstractmethod
    def _start(self, tokens: np.ndarray, steps: int) -> None:
        """Check that the steps can be taken, and put the first one's tokens and positions on the device."""

    @abstractmethod
    def _send(self, slot: int) -> None:
        """Ask for a copy of the picked tokens into one of `SLOTS` slots on the host; does not wait."""

    @abstractmethod
    def _received(self, slot: int) -> np.ndarray:
        """Wait for a slot: its tokens, int64 ``(batch,)``, which are the caller's."""

    @abstractmethod
    def _fetched(self) -> np.ndarray:
        """Wait for the step: its logits, float32 ``(batch, vocab_size)``."""
