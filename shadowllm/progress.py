"""Progress of long steps: a bar on stderr for a person, nothing for a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


def no_progress(_amount: int) -> None:
    """The silent default."""


def is_first() -> bool:
    """Whether this process, of those that a launcher such as torchrun started together, is the one that reports."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A bar from 0 to ``total``; the function yielded moves it on.

    Nothing is written unless stderr is a terminal, and of several processes only the first one writes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not (sys.stderr.isatty() and is_first()):
        yield no_progress
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
