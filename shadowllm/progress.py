"""Progress of long steps: a bar if stderr is a terminal, nothing otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
_shown = False  # whether this process shows a bar


def no_progress(_amount: int) -> None:
    """Do nothing; this is the default."""


def is_first() -> bool:
    """Return whether this process reports, if a launcher such as torchrun started several."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar from 0 to ``total``; the yielded function advances it.

    Nothing is written unless stderr is a terminal. If there are several processes, only the first one writes. Inside
    another bar nothing is written either.
    """
    global _shown
    if _shown or not (sys.stderr.isatty() and is_first()):
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    _shown = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)
    finally:
        _shown = False
