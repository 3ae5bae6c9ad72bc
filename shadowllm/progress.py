"""Progress of long steps: a bar if stderr is a terminal, nothing otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


def no_progress(_amount: int) -> None:
    """Do nothing; this is the default."""


def is_first() -> bool:
    """Return whether this process reports, if a launcher such as torchrun started several."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar from 0 to ``total``; the yielded function advances it.

    Nothing is written unless stderr is a terminal. If there are several processes, only the first one writes.
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
