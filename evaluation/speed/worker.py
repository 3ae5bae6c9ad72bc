"""One contender of a benchmark, alone in its process (see `shadowllm.child` for how it is talked to).

Two sessions in one process disturb each other (their thread pools spin on the same cores), so the
harness starts one worker per contender. This module imports nothing heavy: workers of other
toolkits run it under interpreters of their own.

Requests are ``{"do": "load" | "generate" | "score", ...}``, "load" first and once; every result holds
``peak_rss_mb`` too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shadowllm.child import Progress
from shadowllm.child import serve as serve_requests

if TYPE_CHECKING:
    from shadowllm.runtime.session import Memory

Answer = dict[str, Any]
Commands = Mapping[str, Callable[..., Answer]]
# Yields the new tokens of a prompt, one at a time.
Loop = Callable[[list[int], int], Iterator[int | None]]


class Steps(Protocol):
    """The part of a `Session` that is timed."""

    @property
    def memory(self) -> Memory | None: ...

    @property
    def step_seconds(self) -> Mapping[str, float] | None: ...

    def reset(self, batch: int = 1) -> None: ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> np.ndarray: ...


class StepTimer:
    """Times the steps of a session: the clock runs around ``prefill`` and ``decode`` only."""

    def __init__(self, session: Steps) -> None:
        self._session = session

    def commands(self) -> Commands:
        """What `serve` answers with."""
        return {"generate": self.generate, "score": self.score}

    def generate(self, prompt: list[int], new_tokens: int, forced: list[int] | None = None) -> Answer:
        """Run a prompt and ``new_tokens`` tokens; the first of them comes out of the prefill.

        Args:
            forced: tokens to go on with (teacher forcing) instead of the most probable ones.

        Returns:
            ``ttft_ms``; ``itl_ms``, one per decode step; ``tokens``, as the model chose them;
            ``parts_ms``, mean per decode step and part, where the session measures its parts;
            ``device_memory``, bytes on the GPU by what they hold, where the session knows.
        """
        self._session.reset(1)
        start = time.perf_counter_ns()
        logits = self._session.prefill([prompt])
        ttft = time.perf_counter_ns() - start
        tokens, steps, parts = [int(logits[0].argmax())], [], []
        for index in range(new_tokens - 1):
            step_input = np.array([forced[index] if forced else tokens[-1]], dtype=np.int64)
            start = time.perf_counter_ns()
            logits = self._session.decode(step_input)
            steps.append((time.perf_counter_ns() - start) / 1e6)
            tokens.append(int(logits[0].argmax()))
            parts.append(dict(self._session.step_seconds or {}))
        names, memory = parts[0] if parts else {}, self._session.memory
        return {
            "ttft_ms": ttft / 1e6,
            "itl_ms": steps,
            "tokens": tokens,
            "parts_ms": {name: 1e3 * float(np.mean([part[name] for part in parts])) for name in names},
            "device_memory": vars(memory) if memory else {},
        }

    def score(self, context: list[int], continuation: list[int]) -> Answer:
        """Teacher-forced pass: the context is prefilled, the continuation decoded token by token.

        Returns:
            ``nll``, negative log-likelihood (nats) of each token of the continuation, and
            ``predicted``, the most probable token in its place.
        """
        self._session.reset(1)
        logits = self._session.prefill([context])[0]
        nll, predicted = [], []
        for token in continuation:
            nll.append(_negative_log_likelihood(logits, token))
            predicted.append(int(logits.argmax()))
            logits = self._session.decode(np.array([token], dtype=np.int64))[0]
        return {"nll": nll, "predicted": predicted}


class LoopTimer:
    """Times a whole generation loop, token by token: sampling and bookkeeping count."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def commands(self) -> Commands:
        """What `serve` answers with."""
        return {"generate": self.generate}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        """As `StepTimer.generate`; the clock runs from one token to the next."""
        tokens, ticks = [], [time.perf_counter_ns()]
        for token in self._loop(prompt, new_tokens):
            ticks.append(time.perf_counter_ns())
            tokens.append(token)
        spans = (np.diff(ticks) / 1e6).tolist()
        return {"ttft_ms": spans[0], "itl_ms": spans[1:], "tokens": tokens, "parts_ms": {}}


def serve(load: Callable[[], AbstractContextManager[Commands]]) -> int:
    """Answer requests: first "load", then those that the session's commands answer.

    Args:
        load: opens the session; entering it is the load time reported.

    Returns:
        The exit status: 1 when a request or the loading failed.
    """

    def load_session() -> Answer:
        start = time.perf_counter()
        commands.update(session.enter_context(load()))
        return {"load_seconds": time.perf_counter() - start}

    commands: dict[str, Callable[..., Answer]] = {"load": load_session}

    def answer(request: dict[str, Any], _: Progress) -> Answer:
        return commands[request.pop("do")](**request) | {"peak_rss_mb": peak_rss_mb()}

    with ExitStack() as session:
        return serve_requests(answer)


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in 1e6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum survives exec, so a child would report its parent's.
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kib) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _negative_log_likelihood(logits: np.ndarray, token: int) -> float:
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(top + np.log(np.exp(wide - top).sum()) - wide[token])


def main() -> int:
    """Serve a bundle's session; the arguments are those of `open_session`, and the budget."""
    from shadowllm.models.sparsity import Budget, parse_fractions

    parser = argparse.ArgumentParser(prog="python -m shadowllm.evaluation.speed.worker", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("backend")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--neuron-budget", type=parse_fractions, default=1.0)
    parser.add_argument("--head-budget", type=parse_fractions, default=1.0)
    parser.add_argument("--loop", action="store_true", help="time the generation loop, not the session's steps alone")
    arguments = parser.parse_args()

    @contextmanager
    def load() -> Iterator[Commands]:
        from shadowllm.runtime import generate, open_session

        with open_session(arguments.bundle, arguments.backend, threads=arguments.threads, profile=True) as session:
            session.set_budget(Budget(heads=arguments.head_budget, neurons=arguments.neuron_budget))
            if arguments.loop:
                yield LoopTimer(lambda prompt, n: (row[0] for row in generate(session, [prompt], n))).commands()
            else:
                yield StepTimer(session).commands()

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
