"""Decoding by replays of one step, launched before the results of earlier ones are waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Enough that the GPU never waits for Python.
AHEAD = 4
SLOTS = AHEAD + 1  # tokens on their way to the host


class Replayed(ABC):
    """The decoding half of a `Greedy` session whose step goes on where the last one ended, without the host.

    ``_replay`` launches a step; ``_lengths`` are the tokens of each sequence, int64 ``(batch,)``.
    """

    _lengths: np.ndarray
    _replay: Callable[[], Any]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._start(tokens, 1)
        self._replay()
        self._lengths += 1
        return self._fetched()

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """See `Greedy.decode_greedy`."""
        self._start(tokens, steps)
        return self._ahead(steps)

    def _ahead(self, steps: int) -> Iterator[np.ndarray]:
        for step in range(steps + AHEAD):
            if step < steps:
                self._replay()
                self._send(step % SLOTS)
            if step >= AHEAD:
                found = self._received((step - AHEAD) % SLOTS)
                self._lengths += 1  # what was launched beyond it stands past the end, where nothing looks
                yield found

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
