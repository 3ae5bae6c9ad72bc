"""The texts of one HTTP request while the engine generates them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

from shadowllm.runtime.serving.engine import Engine
from shadowllm.runtime.serving.job import Event, Failed, Finished, Job, Token
from shadowllm.serve.model import Plan
from shadowllm.serve.schema import Body


class Generation:
    """Gives the jobs of a plan to an engine, and their events to a task. Use it in an event loop.

    The events wait in a queue without a limit, so that a slow client does not stop the engine. There are at most as
    many as the texts have tokens.

    Attributes:
        new_tokens: number of tokens of all texts so far.
        first_token: seconds until the first token; None before it.
        outcome: the reason why the last text ended; "cancelled" before that.
    """

    def __init__(self, engine: Engine, plan: Plan, body: Body, deadline: float) -> None:
        self._engine, self._left = engine, len(plan.requests)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.new_tokens, self.outcome = 0, "cancelled"
        self.first_token: float | None = None
        self._started = time.monotonic()
        loop, selection = asyncio.get_running_loop(), body.shadowllm is not None and body.shadowllm.selection

        def send(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        wanted = body.top_logprobs_wanted
        self._jobs = [
            Job(request, partial(send, index), plan.budget, wanted, selection, deadline, step, verification)
            for index, (request, step, verification) in enumerate(
                zip(plan.requests, plan.step_bytes, plan.verification_bytes, strict=True)
            )
        ]

    def submit(self) -> None:
        """Queue all jobs, or none.

        Raises:
            UserError: as `Engine.submit`.
        """
        try:
            for job in self._jobs:
                self._engine.submit(job)
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what has not ended."""
        for job in self._jobs:
            self._engine.cancel(job)

    async def events(self) -> AsyncIterator[tuple[int, Token | Finished]]:
        """Yield the events of all texts, each with the index of its text, until all have ended.

        Raises:
            Exception: the error of a text that failed. The others are cancelled.
        """
        while self._left:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                self.outcome = "error"
                self.cancel()
                raise event.error
            if isinstance(event, Token):
                self.new_tokens += 1
                self.first_token = self.first_token or time.monotonic() - self._started
            else:
                self._left -= 1
                if not self._left:
                    self.outcome = event.reason
            yield index, event
