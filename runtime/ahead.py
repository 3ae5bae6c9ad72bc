"""Steps that are launched before the results of earlier ones are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

# Enough that the GPU never waits for Python.
AHEAD = 4

T = TypeVar("T")


def run_ahead(steps: int, launch: Callable[[int], None], result: Callable[[int], T], ahead: int = AHEAD) -> Iterator[T]:
    """Launch steps up to ``ahead`` before the one whose result is yielded.

    Args:
        launch: start step i and the copy of its result, into slot ``i % (ahead + 1)``, without waiting.
        result: wait for step i and give its result; slots are free again once it returned.
    """
    for step in range(steps + ahead):
        if step < steps:
            launch(step)
        if step >= ahead:
            yield result(step - ahead)
