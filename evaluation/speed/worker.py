"""The worker process of one contender of a benchmark (`shadowllm.child` describes the protocol).

Two sessions in one process disturb each other, because their thread pools spin on the same cores. So the harness
starts one worker per contender. Workers of other toolkits run this module under their own interpreters, so it imports
nothing heavy.

Requests are ``{"do": "load" | "generate" | "score", ...}``. "load" comes first, and only once. Every result also
has ``peak_rss_mb``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shadowllm.child import Progress
from shadowllm.child import serve as serve_requests
from shadowllm.threads import share_threads

if TYPE_CHECKING:
    from shadowllm.draft_config import Drafting
    from shadowllm.runtime.session import Memory, Session

Answer = dict[str, Any]
Commands = Mapping[str, Callable[..., Answer]]
# Takes a prompt and a number of tokens, and yields the new tokens one at a time.
Loop = Callable[[list[int], int], Iterator[int | None]]


class Steps(Protocol):
    """The part of a `Session` that is timed."""

    @property
    def memory(self) -> Memory | None: ...

    @property
    def recomputed(self) -> np.ndarray | None: ...

    @property
    def step_seconds(self) -> Mapping[str, float] | None: ...

    @property
    def fired(self) -> Sequence[float] | None: ...

    def reset(self, batch: int = 1) -> None: ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> np.ndarray: ...


class StepTimer:
    """Times the steps of a session: only ``prefill`` and ``decode`` are timed."""

    def __init__(self, session: Steps) -> None:
        self._session = session

    def commands(self) -> Commands:
        """Return the commands for `serve`."""
        return {"generate": self.generate, "score": self.score}

    def generate(self, prompt: list[int], new_tokens: int, forced: list[int] | None = None) -> Answer:
        """Run a prompt and generate ``new_tokens`` tokens; the first is the result of the prefill.

        Args:
            forced: tokens to feed (teacher forcing) instead of the most probable ones.

        Returns:
            The fields of `harness.Generation` without ``peak_rss_mb``. ``tokens`` are the most probable ones, even if
            others were forced.
        """
        self._session.reset(1)
        start = time.perf_counter_ns()
        logits = self._session.prefill([prompt])
        ttft = time.perf_counter_ns() - start
        tokens, steps, parts, fired, recomputed = [int(logits[0].argmax())], [], [], [], list[int]()
        for index in range(new_tokens - 1):
            step_input = np.array([forced[index] if forced else tokens[-1]], dtype=np.int64)
            start = time.perf_counter_ns()
            logits = self._session.decode(step_input)
            steps.append((time.perf_counter_ns() - start) / 1e6)
            tokens.append(int(logits[0].argmax()))
            parts.append(dict(self._session.step_seconds or {}))
            fired.append(self._session.fired or ())
            if (rows := self._session.recomputed) is not None:
                recomputed.append(int(rows[0]))
        names, memory = parts[0] if parts else {}, self._session.memory
        return {
            "ttft_ms": ttft / 1e6,
            "itl_ms": steps,
            "tokens": tokens,
            "parts_ms": {name: 1e3 * float(np.mean([part[name] for part in parts])) for name in names},
            "device_memory": vars(memory) if memory else {},
            "fired": np.mean(fired, axis=0).tolist() if fired else [],
            "recomputed": recomputed,
        }

    def score(self, context: list[int], continuation: list[int]) -> Answer:
        """Run a teacher-forced pass: prefill the context, then decode the continuation token by token.

        Returns:
            ``nll``, the negative log-likelihood (nats) of each token of the continuation, and
            ``predicted``, the most probable token at its position.
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
    """Times a whole generation loop, token by token, including sampling and bookkeeping.

    Args:
        lossless: returns what the drafts of the last loop gave.
    """

    def __init__(self, loop: Loop, lossless: Callable[[], Answer] = dict) -> None:
        self._loop, self._lossless = loop, lossless

    def commands(self) -> Commands:
        """Return the commands for `serve`."""
        return {"generate": self.generate}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        """Generate like `StepTimer.generate`, but time from one token to the next."""
        tokens, ticks = [], [time.perf_counter_ns()]
        for token in self._loop(prompt, new_tokens):
            ticks.append(time.perf_counter_ns())
            tokens.append(token)
        spans = (np.diff(ticks) / 1e6).tolist()
        answer = {"ttft_ms": spans[0], "itl_ms": spans[1:], "tokens": tokens, "parts_ms": {}}
        return answer | {"lossless": self._lossless()}


def serve(load: Callable[[], AbstractContextManager[Commands]]) -> int:
    """Answer requests: first "load", then the session's commands.

    Args:
        load: returns a context manager that opens the session and gives its commands. Entering it is timed.

    Returns:
        The exit status: 1 if a request or the loading failed.
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
    """Return the largest resident set size of this process so far, in 1e6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum is kept across exec, so a child process would report its parent's.
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
    """Serve a bundle's session. The arguments are those of `open_session`, the budget, and those of `Drafting`."""
    from shadowllm.draft_config import Drafting, TunedDrafts
    from shadowllm.models.sparsity import Budget, parse_fractions

    parser = argparse.ArgumentParser(prog="python -m shadowllm.evaluation.speed.worker", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("backend")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--neuron-budget", type=parse_fractions, default=1.0)
    parser.add_argument("--head-budget", type=parse_fractions, default=1.0)
    parser.add_argument("--shortlist", type=int)
    parser.add_argument("--rest")
    parser.add_argument("--certify", action="store_true")
    parser.add_argument("--prefill", default="dense")
    parser.add_argument("--loop", action="store_true", help="time the generation loop, not the session's steps alone")
    parser.add_argument("--lossless", action="store_true", help="the same, with drafts and their verification")
    parser.add_argument("--draft-length", type=int)
    parser.add_argument("--tuned", type=json.loads, help="the drafts' measurements, as JSON")
    parser.add_argument("--prepack", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling in a loop")
    given = parser.parse_args()
    share_threads()
    budget = Budget(
        heads=given.head_budget,
        neurons=given.neuron_budget,
        shortlist=given.shortlist,
        rest=given.rest,
        certify=given.certify,
    )
    tuned = TunedDrafts(**given.tuned) if given.tuned else None
    drafting = Drafting(given.lossless, given.draft_length, tuned)

    @contextmanager
    def load() -> Iterator[Commands]:
        from shadowllm.runtime import open_session

        options = {"threads": given.threads, "profile": True, "prefill": given.prefill, "prepack": given.prepack}
        with open_session(given.bundle, given.backend, **options) as session:
            session.set_budget(budget)
            loop = given.loop or given.lossless
            timer = _loop_timer(session, drafting, given.temperature) if loop else StepTimer(session)
            yield timer.commands()

    return serve(load)


def _loop_timer(session: Session, drafting: Drafting, temperature: float) -> LoopTimer:
    """Time generations of a session; the lengths of drafts start anew in each."""
    from shadowllm.runtime import Sampling, generate
    from shadowllm.runtime.generation.draft_length import draft_length_of

    last: Answer = {}

    def loop(prompt: list[int], new_tokens: int) -> Iterator[int | None]:
        length = draft_length_of(drafting)
        for row in generate(session, [prompt], new_tokens, Sampling(temperature), draft_length=length):
            yield row[0]
        last.update(length.record.to_dict() if length else {})

    return LoopTimer(loop, lambda: dict(last))


if __name__ == "__main__":
    sys.exit(main())
