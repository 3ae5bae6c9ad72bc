"""The engine: one thread that owns a session with slots, and computes the jobs that it is given."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Self

import numpy as np

from shadowllm.errors import UserError
from shadowllm.runtime.inputs import pad_prompts
from shadowllm.runtime.serving.counters import Counters
from shadowllm.runtime.serving.job import (
    DeadlineError,
    EngineClosedError,
    EngineFailedError,
    Event,
    Failed,
    Finished,
    Job,
    QueueFullError,
    Token,
)
from shadowllm.runtime.serving.selection import active_shares
from shadowllm.runtime.serving.sequence import RunningSequence, end_of
from shadowllm.runtime.slots import SlotSession
from shadowllm.serve_config import EngineConfig

logger = logging.getLogger(__name__)


class Engine:
    """Computes jobs on the slots of a session (continuous batching).

    A context manager: entering starts the thread, leaving ends it and what it still computes. Only this thread uses
    the session. Other threads give it actions through a queue, so the loop has no lock of its own.

    One turn of the loop prefills at most one chunk of the oldest incomplete prompt, decodes one token of every other
    sequence, and verifies the complete drafts of lossless texts. So a long prompt delays running texts by one chunk per
    token.

    Args:
        session: not entered yet.

    Attributes:
        counters: see `Counters`.
        failure: why the session failed; None while it works.
        on_failure: called by the thread when the session has failed and all jobs have ended.
        capacity: number of jobs that run or wait, at most.
        positions: of all running sequences together in the cache, at most.
    """

    def __init__(self, session: SlotSession, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig(slots=session.slots)
        self.counters = Counters()
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._session, self._spec, self._chunk = session, session.spec, config.prefill_chunk
        self._backend = type(session).__name__
        self.positions = config.cache_positions or session.slots * session.spec.max_seqlen
        self.capacity = session.slots + config.queue
        self._places = threading.Semaphore(self.capacity)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Only the thread uses these. Both are in the order in which jobs came.
        self._waiting: dict[Job, bool] = {}  # the values have no meaning
        self._running: dict[Job, RunningSequence] = {}
        self._close_at = float("inf")
        self._closing = False
        self._started, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self.failure is not None:
            raise self.failure
        return self

    def __exit__(self, *error: object) -> None:
        self.drain(0)
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Queue a job. Its events follow until one `Finished` or `Failed`.

        Raises:
            QueueFullError: as many jobs as possible are waiting.
            EngineClosedError: the engine stops.
            EngineFailedError: the session failed.
            UserError: the engine can never compute this job.
        """
        self._check(job)
        if self.failure is not None:
            raise EngineFailedError
        if self._closing:
            raise EngineClosedError
        if not self._places.acquire(blocking=False):
            raise QueueFullError
        self._inbox.put(partial(self._waiting.__setitem__, job, True))
        if self._ended.is_set():  # the thread may have ended before it saw the job
            self._end_all()

    def cancel(self, job: Job) -> None:
        """End a job, if it has not ended."""
        if self._ended.is_set():  # all jobs have ended, and nothing reads the inbox
            return
        self._inbox.put(partial(self._end, job, Finished("cancelled")))

    def drain(self, grace: float) -> None:
        """Accept no more jobs, and end the engine when all are done; after ``grace`` seconds the others fail."""
        self._closing = True
        self._inbox.put(partial(self._close_after, time.monotonic() + grace))

    @property
    def accepts(self) -> bool:
        """Whether jobs can be submitted, if there is room for them."""
        return self.failure is None and not self._closing

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs that have a slot."""
        return len(self._running)

    def _check(self, job: Job) -> None:
        if len(job.request.prompts) != 1:
            raise UserError(f"a job has {len(job.request.prompts)} prompts", "submit one job per prompt")
        pad_prompts(job.request.prompts, 1, self._spec)
        if (needed := self._positions_of(job)) > self.positions:
            raise UserError(
                f"prompt and text need {needed} positions, the server has {self.positions}",
                "send a shorter prompt, or ask for fewer tokens",
            )

    def _positions_of(self, job: Job) -> int:
        """Positions that a job's sequence may use in the cache. The last token of a text is not in the cache."""
        return end_of(job, self._spec) - 1

    def _run(self) -> None:
        try:
            with self._session:
                self._started.set()
                while self._receive():
                    self._expire()
                    self._admit()
                    self._prefill()
                    self._decode()
                    self._verify()
        except Exception as error:
            self.failure = error
            if self._started.is_set():  # else `__enter__` raises it
                logger.exception("the session failed")
        finally:
            self._ended.set()
            self._end_all()
            self._started.set()
            if self.failure is not None:
                self.on_failure()

    def _receive(self) -> bool:
        """Run the actions in the inbox; wait for one if there is nothing to compute. False if the engine must end."""
        if not self._waiting and not self._running:
            if self._closing and self._inbox.empty():
                return False
            self._inbox.get()()
        for action in self._actions():
            action()
        return True

    def _actions(self) -> Iterator[Callable[[], None]]:
        with suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()

    def _close_after(self, close_at: float) -> None:
        self._close_at = min(self._close_at, close_at)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in list(chain(self._waiting, self._running)):
            if now >= self._close_at:
                self._end(job, Failed(EngineClosedError()))
            elif job.deadline is not None and now >= job.deadline:
                self._end(job, Failed(DeadlineError()))

    def _admit(self) -> None:
        """Give slots to jobs that wait, the oldest first, as long as there is room for it."""
        used = sum(map(self._positions_of, self._running))
        for job in list(self._waiting):
            needed = self._positions_of(job)
            if len(self._running) == self._session.slots or used + needed > self.positions:
                return
            try:
                slot = self._session.join(job.budget, needed)
            except Exception as error:  # noqa: BLE001  (a fault of one job must not end the others)
                self._end(job, Failed(error))
                continue
            del self._waiting[job]
            try:
                self._running[job] = RunningSequence(job, slot, self._spec, self._backend, self._session.decodes(slot))
                used += needed
            except Exception as error:  # noqa: BLE001  (options of this job that another package refuses)
                self._session.leave(slot)
                self._finish(job, Failed(error))

    def _prefill(self) -> None:
        """Extend the oldest incomplete prompt by one chunk."""
        sequence = next((sequence for sequence in self._running.values() if sequence.in_prefill), None)
        if sequence is None:
            return
        chunk = sequence.prompt[sequence.prefilled : sequence.prefilled + self._chunk]
        try:
            logits = self._session.extend(sequence.slot, chunk)
        except Exception as error:  # noqa: BLE001  (as above; for example no memory for a longer cache)
            self._end(sequence.job, Failed(error))
            return
        sequence.prefilled += len(chunk)
        self.counters.prompt_tokens += len(chunk)
        if not sequence.in_prefill and (last := self._take(sequence, logits)) is not None:
            self._end(sequence.job, last)

    def _decode(self) -> None:
        """Decode one token of every sequence whose prompt is complete, and whose draft is not."""
        sequences = [sequence for sequence in self._running.values() if sequence.decodes]
        if not sequences:
            return
        start = time.perf_counter()
        found = self._session.step({sequence.slot: sequence.ahead[-1] for sequence in sequences})
        seconds = time.perf_counter() - start
        # One sequence of each step in turn, because reading all selections would cost time.
        watched = sequences[self.counters.steps % len(sequences)]
        self.counters.add_shares(active_shares(self._session.selection(watched.slot)))
        self.counters.steps += 1
        self.counters.read_bytes += sum(sequence.job.step_bytes for sequence in sequences)
        # Slots are left at the end, because a call may overwrite the logits.
        ended = {}
        for sequence in sequences:
            logits = found[sequence.slot]
            if sequence.drafts is None:
                ended[sequence.job] = self._take(sequence, logits)
            else:
                ended[sequence.job] = self._give(sequence, partial(sequence.draft, logits, seconds))
        for job, last in ended.items():
            if last is not None:
                self._end(job, last)

    def _verify(self) -> None:
        """Verify the complete drafts of lossless texts."""
        for sequence in [sequence for sequence in self._running.values() if sequence.waits_for_verification]:
            start, drafted, before = time.perf_counter(), len(sequence.ahead) - 1, sequence.length
            self._session.rewind(sequence.slot, before)
            try:
                logits = self._session.verify(sequence.slot, sequence.ahead)
            except Exception as error:  # noqa: BLE001  (as above)
                self._end(sequence.job, Failed(error))
                continue
            last = self._give(sequence, partial(sequence.accept, logits, time.perf_counter() - start))
            self.counters.drafted += drafted
            self.counters.accepted += max(0, sequence.length - before - 1)
            self.counters.read_bytes += sequence.job.verification_bytes
            if last is not None:
                self._end(sequence.job, last)
            else:
                self._session.rewind(sequence.slot, sequence.length)

    def _take(self, sequence: RunningSequence, logits: np.ndarray) -> Event | None:
        """Choose a sequence's next token and send it; return the last event if the text has ended."""
        selection = self._session.selection(sequence.slot) if sequence.job.selection else None
        return self._give(sequence, partial(sequence.take, logits, selection))

    def _give(self, sequence: RunningSequence, take: Callable[[], Sequence[Token | Finished]]) -> Event | None:
        """Send the events that ``take`` returns; return the last event if the text has ended."""
        job = sequence.job
        try:
            events = take()
        except Exception as error:  # noqa: BLE001  (a fault of one job must not end the others)
            return Failed(error)
        for event in events:
            if isinstance(event, Finished):
                return event
            now = time.monotonic()
            self.counters.add_token(sequence.last_event, sequence.new_tokens == 1, now)
            sequence.last_event = now
            try:
                job.send(event)
            except Exception:  # noqa: BLE001  (nobody listens any more)
                return Finished("cancelled")
        return None

    def _end(self, job: Job, last: Event) -> None:
        """End a job that waits or runs, and free its slot. Nothing is done if it has ended already."""
        sequence = self._running.pop(job, None)
        if sequence is None and not self._waiting.pop(job, False):
            return
        try:
            if sequence is not None:
                self._session.leave(sequence.slot)
        finally:
            self._finish(job, last)

    def _finish(self, job: Job, last: Event) -> None:
        self._places.release()
        self.counters.end(last)
        with suppress(Exception):  # nobody listens any more
            job.send(last)

    def _end_all(self) -> None:
        """End all jobs after the loop has ended. Each action and each job is taken by one thread only."""
        error = EngineClosedError if self.failure is None else EngineFailedError
        while self._running:  # the session is closed, so no slot is left
            job, _ = self._running.popitem()
            self._finish(job, Failed(error()))
        for action in self._actions():
            action()
        with suppress(KeyError):
            while True:
                job, _ = self._waiting.popitem()
                self._finish(job, Failed(error()))
