"""Runs contenders against each other: one worker process each, runs interleaved, warm-up left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from shadowllm.child import Child, ChildError
from shadowllm.errors import UserError

# Thread pools spin for a few milliseconds after their last task; let them fall asleep before the next one runs.
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Contender:
    """A name for the table, and the command that starts its worker (see `worker.serve`)."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """Times of one generation, in milliseconds.

    Attributes:
        itl_ms: one per decode step, so one fewer than ``tokens``.
        parts_ms: mean per decode step of each part the session tells apart; empty if it does not.
        peak_rss_mb: of the worker so far, in 1e6 bytes.
        device_memory: bytes on the GPU by what they hold; empty where the session does not say.
    """

    ttft_ms: float
    itl_ms: list[float]
    tokens: list[int]
    parts_ms: dict[str, float]
    peak_rss_mb: float
    device_memory: dict[str, int] = field(default_factory=dict)


class Worker:
    """A running worker process; leaving the context ends it.

    Attributes:
        load_report: ``load_seconds``, and ``peak_rss_mb`` in 1e6 bytes, once entered.

    Raises:
        UserError: what the worker reports as the user's to mend, or that it died.
    """

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        self._program = contender.command[0]
        # There is nothing that it should clean up.
        self._child = Child(contender.command, f"the worker of {self.name}", grace=0)
        self.load_report: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            try:
                undo.enter_context(self._child)
            except OSError as error:
                raise UserError(
                    f"cannot start the worker of {self.name} ({error.strerror}: {self._program})",
                    "name an interpreter that exists",
                ) from error
            self.load_report = self.ask("load")
            self._running = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        try:
            return dict(self._child.ask({"do": do, **arguments}))
        except UserError as error:
            raise UserError(f"{self.name}: {error.problem}", error.remedy) from error
        except ChildError as death:
            reason = f"killed by signal {-death.status}" if death.signal else f"exit status {death.status}"
            last = f": {death.said[-1].strip()[:300]}" if death.said else ""
            memory = death.signal == "SIGKILL"
            remedy = "the machine may have run out of memory" if memory else "run the contender alone to see why"
            raise UserError(f"the worker of {self.name} died ({reason}){last}", remedy) from death

    def generate(self, **arguments: Any) -> Generation:
        """One timed generation; arguments as `worker.StepTimer.generate` takes them."""
        return Generation(**self.ask("generate", **arguments))


# A last pass over the running workers, for example one that measures quality.
After = Callable[[Mapping[str, Worker], Mapping[str, Sequence[Generation]]], Any]


def race(
    contenders: Sequence[Contender],
    requests: Mapping[str, Any],
    *,
    runs: int,
    warmup: int,
    after: After | None = None,
    tick: Callable[[str], None] = lambda _: None,
    settle: float = SETTLE_SECONDS,
) -> tuple[dict[str, list[Generation]], Any]:
    """Time every contender ``runs`` times in turn: A B C, B C A, C A B, ...

    Interleaving spreads a machine's slow and fast spells over all contenders alike, and run i of
    one can be held against run i of another. Whoever starts a round finds code and files colder than
    those behind it (3% to 6% of a first token), so all take that place in turn.

    Args:
        contenders: started in this order, all alive until the end.
        requests: arguments of each ``generate`` request.
        warmup: rounds that come first and are not counted.
        after: called with the workers and the counted generations after the last run.
        tick: told the contender's name after each generation, warm-up included.
        settle: seconds of rest before each generation.

    Returns:
        The counted generations of each contender, in order, and what ``after`` returned.
    """
    taken: dict[str, list[Generation]] = {contender.name: [] for contender in contenders}
    with ExitStack() as stack:
        workers = {contender.name: stack.enter_context(Worker(contender)) for contender in contenders}
        for number in range(warmup + runs):
            first = number % len(contenders)
            for name in [contender.name for contender in (*contenders[first:], *contenders[:first])]:
                time.sleep(settle)
                generation = workers[name].generate(**requests)
                if number >= warmup:
                    taken[name].append(generation)
                tick(name)
        return taken, after(workers, taken) if after else None


@dataclass(frozen=True)
class Summary:
    """What the runs of one contender come to.

    Attributes:
        ttft_ms: min, median and max over runs.
        itl_ms: min, median, mean, max and the percentiles asked for ("p50", "p90", ...) over all
            decode steps of all runs.
        tokens_per_second: decode throughput, median over runs; TTFT is not in it.
        tokens_per_second_spread: slowest and fastest run.
        parts_ms: median over runs.
        device_memory: bytes by what they hold, the same in every run.
    """

    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tokens_per_second: float
    tokens_per_second_spread: tuple[float, float]
    parts_ms: dict[str, float]
    peak_rss_mb: float
    device_memory: dict[str, int] = field(default_factory=dict)


def summarise(generations: Sequence[Generation], percentiles: Sequence[float] = (50, 90, 99)) -> Summary:
    """Aggregate the runs of one contender."""
    steps = np.concatenate([generation.itl_ms for generation in generations])
    ttft = [generation.ttft_ms for generation in generations]
    rates = [1e3 * len(generation.itl_ms) / sum(generation.itl_ms) for generation in generations]
    itl = {"min": steps.min(), "median": np.median(steps), "mean": steps.mean(), "max": steps.max()}
    itl |= {f"p{percent:g}": np.percentile(steps, percent) for percent in percentiles}
    parts = {
        name: float(np.median([generation.parts_ms[name] for generation in generations]))
        for name in generations[0].parts_ms
    }
    return Summary(
        ttft_ms={"min": min(ttft), "median": float(np.median(ttft)), "max": max(ttft)},
        itl_ms={name: float(value) for name, value in itl.items()},
        tokens_per_second=float(np.median(rates)),
        tokens_per_second_spread=(min(rates), max(rates)),
        parts_ms=parts,
        peak_rss_mb=max(generation.peak_rss_mb for generation in generations),
        device_memory=generations[-1].device_memory,
    )


def speedup(baseline: Sequence[Generation], other: Sequence[Generation]) -> dict[str, float]:
    """How many times faster ``other`` decodes than ``baseline``, run i against run i.

    Returns:
        ``median``, ``min`` and ``max`` over runs of the ratio of the median inter-token latencies.
    """
    ratios = [
        float(np.median(slow.itl_ms) / np.median(fast.itl_ms)) for slow, fast in zip(baseline, other, strict=True)
    ]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}
