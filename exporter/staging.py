"""Output folders that appear whole or not at all.

Beside an output ``out``, or in it where nothing can be moved from beside it, may lie:

- ``.out.lock``: held by the process that writes ``out``. The system lets go of it when that process ends.
- ``.out.partial-PID``: the new contents, until they are whole.
- ``.out.moving-PID``: old contents on their way out; what ``out`` still holds is old as well.
- ``.out.replaced-PID``: all of the old contents; what ``out`` holds is new, and perhaps not whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shadowllm.errors import UserError, os_error

LONGEST = 200  # bytes of a name that `.NAME.partial-PID` still fits around: file systems allow 255


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists or cannot be made, before any work is done.

    Raises:
        UserError: it exists and may not be replaced, or there is no folder to make it in.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to nothing", "remove the link, or name another folder")
    if out.exists() and not ((out / "manifest.json").is_file() or (out.is_dir() and not any(_entries(out)))):
        raise UserError(f"{out} exists already and is not a bundle", "name another folder")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already", "name another folder, or replace it with --overwrite")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a folder", "name another folder")
    if not out.parent.exists():
        raise UserError(f"the folder {out.parent} does not exist", "make it first")


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder whose contents become those of ``out`` when the block ends without an error.

    A new ``out`` appears in one step. An ``out`` that exists stays the same folder, for a shell may be in it, a file
    system mounted on it or a link lead to it: its old contents are moved out and the new ones in. Where that fails they
    are moved back, and where the process dies on the way the next one that stages ``out`` moves them back.

    Raises:
        UserError: as `check_output`, another process or thread is writing ``out``, or the system allows no writing
            (full disk, permissions and the like).
    """
    try:
        if out.is_symlink() and not out.exists():
            check_output(out, overwrite)
        out = out.resolve()
        if not out.parent.is_dir():
            check_output(out, overwrite)
        home = _home(out)
        with _locked(home / _name(out, "lock"), out):
            _recover(home, out)
            check_output(out, overwrite)
            folder = home / _name(out, f"partial-{os.getpid()}")
            folder.mkdir()
            try:
                yield folder
                check_output(out, overwrite)  # again: much time may have passed
                _publish(folder, out)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if _name(out, "") in str(error.filename):
            error.filename = None  # the user knows the output by its own name alone
        if (known := os_error(error, out)) is None:
            raise
        raise known from error


def _name(out: Path, kind: str) -> str:
    name = os.fsencode(out.name)
    if len(name) > LONGEST:
        name = name[: LONGEST - 9] + b"-" + hashlib.sha256(name).hexdigest()[:8].encode()
    return f".{os.fsdecode(name)}.{kind}"


def _home(out: Path) -> Path:
    """Where the files of the staging lie: beside ``out``, or in it where nothing can be moved there from beside it."""
    if not out.is_dir():
        return out.parent
    name = _name(out, f"probe-{os.getpid()}{threading.get_ident()}")
    probe = out.parent / name
    try:
        probe.mkdir()
        os.rename(probe, out / name)
    except OSError:  # another file system, or a parent that may not be written
        return out
    finally:
        for place in (out, out.parent):
            with suppress(OSError):
                (place / name).rmdir()
    return out.parent


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold a lock file, which is there only as long as it is held."""
    handle = _lock(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, out: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another export to {out} is running", "wait until it ends, or name another folder"
            ) from None
        except FileNotFoundError:  # its last owner removed the file after we opened it
            os.close(handle)


def _publish(folder: Path, out: Path) -> None:
    """Give ``out`` the contents of ``folder``, or leave it as it was."""
    if not out.exists():
        os.rename(folder, out)
        return
    moving = folder.with_name(_name(out, f"moving-{os.getpid()}"))
    replaced = folder.with_name(_name(out, f"replaced-{os.getpid()}"))
    try:
        moving.mkdir()
        _move(out, moving)
        os.rename(moving, replaced)
        _move(folder, out)
    except BaseException:
        _recover(folder.parent, out, spare=folder)
        raise
    os.rename(replaced, folder)  # which is empty; what lies there the next process may delete


def _recover(home: Path, out: Path, spare: Path | None = None) -> None:
    """Bring ``out`` back to what it was before a process died or failed, and remove what that left behind."""
    for moving in _leftovers(home, out, "moving"):
        _give_back(moving, out)
    for replaced in _leftovers(home, out, "replaced"):
        if out.is_dir():
            for entry in _entries(out):
                _remove(entry)
        _give_back(replaced, out)
    for partial in _leftovers(home, out, "partial"):
        if partial != spare:
            shutil.rmtree(partial)


def _give_back(old: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    _move(old, out)
    old.rmdir()


def _leftovers(home: Path, out: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(_name(out, "")) + kind + r"-\d+")
    return [path for path in home.iterdir() if pattern.fullmatch(path.name)]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, without the files of its own staging."""
    own = re.compile(re.escape(_name(folder, "")) + r"(lock|(partial|moving|replaced|probe)-\d+)")
    return [path for path in folder.iterdir() if not own.fullmatch(path.name)]


def _move(source: Path, target: Path) -> None:
    for entry in _entries(source):
        os.rename(entry, target / entry.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
