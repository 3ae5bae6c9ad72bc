"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us: a missing file, a wrong family, a corrupt bundle.

    The command line prints it as one line and exits with code 1. Anything else that escapes is a
    bug and keeps its traceback.

    Args:
        problem: what is wrong, naming the file or value.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
