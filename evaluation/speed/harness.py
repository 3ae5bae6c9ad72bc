"""Runs contenders in turns, each in its own worker process, and summarises their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from shadowllm.child import Child, ChildError
from shadowllm.errors import UserError

# Thread pools spin for a few milliseconds after their last task. They should sleep before the next contender runs.
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Contender:
    """A name for the table, and the command that starts a worker (see `worker.serve`)."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """Times of one generation, in milliseconds.

    Attributes:
        itl_ms: one per decode step, so one fewer than ``tokens``.
        parts_ms: mean time per decode step of each part; empty if the session does not measure parts.
        peak_rss_mb: peak of the worker so far, in 1e6 bytes.
        device_memory: bytes on the GPU by purpose; empty if the session does not report them.
        fired: mean share of the neurons of each sparse layer that fired (`Session.fired`); empty if not reported.
        recomputed: rows of the output table that each decode step computed exactly; empty if they are not known.
        lossless: what the drafts of lossless decoding gave (`DraftRecord.to_dict`); empty without them.
    """

    ttft_ms: float
    itl_ms: list[float]
    tokens: list[int]
    parts_ms: dict[str, float]
    peak_rss_mb: float
    device_memory: dict[str, int] = field(default_factory=dict)
    fired: list[float] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)
    lossless: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A running worker process. Leaving the context ends it.

    Attributes:
        load_report: ``load_seconds`` and ``peak_rss_mb`` (1e6 bytes), set on entering the context.

    Raises:
        UserError: the worker raised it, or the worker died.
    """

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        self._program = contender.command[0]
        # No grace period: a worker has nothing to clean up.
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
        """Run one timed generation. The arguments are those of `worker.StepTimer.generate`."""
        return Generation(**self.ask("generate", **arguments))


# A function that uses the workers after the last run, for example to measure quality.
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

    Interleaving distributes slow and fast phases of the machine over all contenders. So run i of one contender can be
    compared with run i of another. The first contender of a round is slower, because its code and files are not in the
    caches (3% to 6% of the time to the first token). So the contenders take turns at going first.

    Args:
        contenders: started in this order, and all running until the end.
        requests: arguments of each ``generate`` request.
        warmup: number of rounds at the start that are not counted.
        after: called with the workers and the counted generations after the last run.
        tick: called with the contender's name after each generation, including the warm-up.
        settle: seconds to sleep before each generation.

    Returns:
        The counted generations of each contender, in order, and the result of ``after``.
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
    """The summary of the runs of one contender.

    Attributes:
        ttft_ms: min, median and max over runs.
        itl_ms: min, median, mean, max and percentiles ("p50", "p90", ...) over all decode steps of all runs.
        tokens_per_second: decode throughput without TTFT, median over runs.
        tokens_per_second_spread: slowest and fastest run.
        parts_ms: median over runs.
        device_memory: bytes on the GPU by purpose, of the last run.
        fired: mean over runs; empty if the session does not report it.
    """

    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tokens_per_second: float
    tokens_per_second_spread: tuple[float, float]
    parts_ms: dict[str, float]
    peak_rss_mb: float
    device_memory: dict[str, int] = field(default_factory=dict)
    fired: list[float] = field(default_factory=list)


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
        fired=np.mean([generation.fired for generation in generations], axis=0).tolist(),
    )


def speedup(
    baseline: Sequence[Generation],
    other: Sequence[Generation],
    average: Callable[[Sequence[float]], Any] = np.median,
) -> dict[str, float]:
    """Return how many times faster ``other`` decodes than ``baseline``, comparing run i with run i.

    Args:
        average: of the inter-token latencies of a run. Tokens of lossless decoding come several at once, so only the
            mean says how fast it is.

    Returns:
        ``median``, ``min`` and ``max`` over runs of the ratio of the average inter-token latencies.
    """
    ratios = [float(average(slow.itl_ms) / average(fast.itl_ms)) for slow, fast in zip(baseline, other, strict=True)]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}
