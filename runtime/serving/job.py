"""A request for one text as the engine sees it: what to generate, and the events that come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.generation.completion import Request
from shadowllm.runtime.serving.selection import SelectionSummary

Reason = Literal["stop", "length", "cancelled"]


class QueueFullError(UserError):
    """All slots are taken and the queue is full. The same request may work later."""

    def __init__(self) -> None:
        super().__init__("all slots are taken and the queue is full", "send the request again later")


class DeadlineError(UserError):
    """The request's time was over before its text was complete."""

    def __init__(self) -> None:
        super().__init__("the request took too long", "ask for fewer tokens, or send it again later")


class EngineClosedError(UserError):
    """The engine stops, so it accepts no request, or ended one that was running."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", "send the request again later")


class EngineFailedError(UserError):
    """The session failed, so no request can be computed any more."""

    def __init__(self) -> None:
        super().__init__("the model's session failed", "the server must be started again")


@dataclass(frozen=True, slots=True)
class Token:
    """One new token.

    Attributes:
        token: its id.
        text: text that is final now; it may be empty, because later tokens may change the end of the text.
        logprob: logarithm of its probability in the model's distribution, before any sampling option; None if it was
            not asked for.
        top: the most probable tokens with the same, most probable first.
        selection: what its step computed at full precision; None if it was not asked for, or the step was dense.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    selection: SelectionSummary | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a text that ended as it should, or was cancelled.

    Attributes:
        reason: a stop token or string, the largest number of tokens or positions, or a cancellation.
        text: the rest of the text.
    """

    reason: Reason
    text: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a text that could not be completed.

    Attributes:
        error: a `UserError` explains it to the user; any other exception is a bug.
    """

    error: Exception


Event = Token | Finished | Failed


@dataclass(eq=False)
class Job:
    """One text to generate.

    Attributes:
        request: with exactly one prompt.
        send: called with each event, in the engine's thread. It must not wait. If it raises, the job is cancelled.
        budget: of the decode steps; None is the bundle's own.
        logprobs: number of most probable tokens to give with each token; None gives no probabilities.
        selection: give the selection with each token.
        deadline: value of `time.monotonic` at which the job ends with a `DeadlineError`.
        step_bytes, verification_bytes: bytes that a decode step of this text alone reads, and the verification of a
            draft, for the counters.
        submitted: value of `time.monotonic` when the job was made.
    """

    request: Request
    send: Callable[[Event], None]
    budget: Budget | None = None
    logprobs: int | None = None
    selection: bool = False
    deadline: float | None = None
    step_bytes: int = 0
    verification_bytes: int = 0
    submitted: float = field(default_factory=time.monotonic)
