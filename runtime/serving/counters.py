"""What an engine counts. Its thread writes, other threads only read."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import get_args

from shadowllm.models.sparsity import UNITS, Unit
from shadowllm.runtime.serving.job import DeadlineError, EngineClosedError, Event, Failed, Finished, Reason

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WINDOW = 1.0  # seconds over which tokens per second are measured
OUTCOMES = (*get_args(Reason), "timeout", "shutdown", "error")


class Histogram:
    """Counts of values by size.

    Attributes:
        bounds: upper limits of the buckets; the last bucket has none.
        counts: number of values in each bucket.
        total: sum of all values.
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """Counts since the engine started.

    Attributes:
        prompt_tokens, new_tokens: tokens prefilled and generated.
        steps: decode steps.
        read_bytes: `Job.step_bytes` and `Job.verification_bytes` of every text in every step.
        drafted, accepted: drafted tokens of lossless texts, and those of them that are in the text.
        outcomes: ended jobs, by `OUTCOMES`.
        first_token: seconds from the submission of a job to its first token.
        inter_token: seconds between two tokens of a job.
        share_sums, share_steps: sum of the shares of active units, and the number of steps in it.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.new_tokens = self.steps = self.read_bytes = 0
        self.drafted = self.accepted = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.first_token, self.inter_token = Histogram(), Histogram()
        self.share_sums: dict[Unit, float] = dict.fromkeys(UNITS, 0.0)
        self.share_steps = 0
        self._since, self._before, self._rate = time.monotonic(), 0, 0.0

    def add_token(self, since: float, first: bool, now: float) -> None:
        """Count a new token of a job.

        Args:
            since: when the job was submitted, or got its last token.
            first: whether it is the job's first token.
            now: the time; both are values of `time.monotonic`.
        """
        self.new_tokens += 1
        (self.first_token if first else self.inter_token).add(now - since)
        elapsed = now - self._since
        if elapsed > WINDOW:
            self._rate = 0.0 if elapsed > 2 * WINDOW else (self.new_tokens - self._before) / elapsed
            self._since, self._before = now, self.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, measured in the last second or two."""
        return self._rate if time.monotonic() - self._since < 2 * WINDOW else 0.0

    def add_shares(self, shares: dict[Unit, float]) -> None:
        """Count the shares of active units in a decode step."""
        for unit, share in shares.items():
            self.share_sums[unit] += share
        self.share_steps += 1

    def end(self, event: Event) -> None:
        """Count the last event of a job."""
        if isinstance(event, Finished):
            self.outcomes[event.reason] += 1
        elif isinstance(event, Failed):
            names: dict[type[Exception], str] = {DeadlineError: "timeout", EngineClosedError: "shutdown"}
            self.outcomes[names.get(type(event.error), "error")] += 1
