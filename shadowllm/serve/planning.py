"""Plans requests one after the other, outside the event loop."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from shadowllm.runtime.serving.job import DeadlineError, QueueFullError
from shadowllm.serve.model import Plan, ServedModel
from shadowllm.serve.schema import ChatBody, CompletionBody


class Planner:
    """Plans requests for a model. Use it in one event loop.

    Requests wait in the event loop and not in the queue of a thread, so that one whose client is gone leaves at once.

    Args:
        model: its `plan` runs in one thread, because a tokenizer may change its own state.

    Attributes:
        most: how many requests can be planned or wait for it at once; as many as the engine holds.
        held: how many are planned now, or wait for it.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model, self._thread, self._turn = model, ThreadPoolExecutor(1, "tokenize"), asyncio.Lock()
        self.most, self.held = model.engine.capacity, 0

    async def plan(self, body: CompletionBody | ChatBody, deadline: float) -> Plan:
        """Return the plan of a request. A cancellation takes it out, if its turn has not come.

        Args:
            deadline: when it is too late, as `time.monotonic`.

        Raises:
            QueueFullError: too many requests wait already.
            DeadlineError: the time is over.
            ApiError, UserError: as `ServedModel.plan`.
        """
        if self.held >= self.most:
            raise QueueFullError
        self.held += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                try:
                    await self._turn.acquire()
                except BaseException:
                    self.held -= 1
                    raise
                return await self._run(body)
        except TimeoutError:
            raise DeadlineError from None

    async def _run(self, body: CompletionBody | ChatBody) -> Plan:
        """Plan in the thread. A plan that has begun cannot be ended, so it keeps its turn and its place to its end."""
        loop = asyncio.get_running_loop()

        def ended(_: Future[Plan]) -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(self._leave)

        try:
            planning = self._thread.submit(self._model.plan, body)
        except BaseException:  # the server ends
            self._leave()
            raise
        planning.add_done_callback(ended)
        return await asyncio.wrap_future(planning)

    def _leave(self) -> None:
        self.held -= 1
        self._turn.release()

    def close(self) -> None:
        """Plan nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
