"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def foreign_reader(problem: str, remedy: str) -> Iterator[None]:
    """Around a call of another package's reader on a file of the user: whatever it raises is the file's fault.

    Such readers document no set of exceptions: a null in a config is a ZeroDivisionError, a new kind of
    tokenizer a bare Exception. So this is the one place that catches them all.

    Raises:
        UserError: ``problem``, with what the reader said in brackets.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem} ({in_one_line(error)})", remedy) from error


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception says, without line breaks, at most ``limit`` characters; its kind if it says nothing."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


# What the system may refuse for a reason that lies outside this program, and what helps.
_OS_REMEDIES = {
    errno.ENOSPC: "free disk space, or name a place on another disk",
    errno.EDQUOT: "free disk space within your quota, or name a place on another disk",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`), or name a place on another file system",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "name a place inside a folder",
    errno.ENOLCK: "name a place on a file system that has file locks",
    errno.EOPNOTSUPP: "name a place on a file system that has file locks",
    errno.ELOOP: "mend the link, or name another place",
}


def os_error(error: OSError, place: object = "the output") -> UserError | None:
    """What an error of the system means to the user; None for one that is a bug of ours, such as a missing file.

    Args:
        place: what was being written, where the error names no file itself.
    """
    if error.errno not in _OS_REMEDIES:
        return None
    # Bytes are what a third-party writer gave for a name.
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else place
    return UserError(f"cannot use {name} ({error.strerror})", _OS_REMEDIES[error.errno])
