"""The exception for errors that the user can fix, and conversions to it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error in the user's input: a missing file, an unsupported family, a damaged bundle.

    The command line prints it as one line and exits with code 1. Any other exception is a bug and
    keeps its traceback.

    Args:
        problem: what is wrong, naming the file or value.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class BundleGoneError(UserError):
    """The files of a bundle were removed or replaced while it was in use."""

    def __init__(self) -> None:
        super().__init__("the bundle was removed or replaced while it was in use", "start again")


@contextmanager
def foreign_reader(problem: str, remedy: str) -> Iterator[None]:
    """Convert any exception of another package's reader of a user's file to a `UserError`.

    Such readers do not document their exceptions. For example, a null in a config raises a ZeroDivisionError, and
    a new kind of tokenizer raises a bare Exception. Therefore all are caught.

    Raises:
        UserError: ``problem``, with the reader's message in brackets.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem} ({in_one_line(error)})", remedy) from error


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's message in one line of at most ``limit`` characters; its type if it has no message."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


# System errors whose cause is outside this program, with their remedies.
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
    errno.ELOOP: "correct the link, or name another place",
}


def os_error(error: OSError, place: object = "the output") -> UserError | None:
    """Return the `UserError` for a system error; None if it is a bug of ours, such as a missing file.

    Args:
        place: what was being written, if the error names no file.
    """
    if error.errno not in _OS_REMEDIES:
        return None
    # Third-party writers may give the name as bytes.
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else place
    return UserError(f"cannot use {name} ({error.strerror})", _OS_REMEDIES[error.errno])


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a file that a block writes, and that becomes ``path`` at its end. Until then, an older file stays.

    What is no regular file, as a pipe, is yielded itself.

    Raises:
        UserError: the file cannot be written.
    """
    target = path.resolve()  # a link stays a link
    replaces = target.is_file() or not target.exists()
    part = target.with_name(f".partial-{target.name}") if replaces else path
    try:
        yield part
        if replaces:
            os.replace(part, target)
    except OSError as error:
        error.filename = None  # users know the path, not the temporary file
        known = os_error(error, path)
        raise known or UserError(
            f"cannot write {path} ({error.strerror})", "name a file in a folder that exists"
        ) from error
    finally:
        if replaces:
            part.unlink(missing_ok=True)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Name the folder of temporary files in the system's errors of a block that writes there.

    Raises:
        UserError: a file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except OSError as error:
        if (known := os_error(error, f"the temporary folder {tempfile.gettempdir()}")) is None:
            raise
        raise UserError(known.problem, "set TMPDIR to a folder on another disk, or free space on this one") from error
