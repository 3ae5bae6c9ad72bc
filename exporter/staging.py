"""Output folders that appear completely or not at all.

These temporary files are beside the output ``out``, or inside it if nothing can be moved into it from outside:

- ``.out.lock``: locked by the process that writes ``out``. The system unlocks it when that process ends.
- ``.out.partial-PID``: the new contents, until they are complete.
- ``.out.moving-PID``: old contents, while they are moved out. ``out`` still has the rest of the old contents.
- ``.out.replaced-PID``: all of the old contents. ``out`` has new contents, which may be incomplete.
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

from shadowllm.bundle.manifest import DATA_FILE
from shadowllm.errors import UserError, os_error

LONGEST = 200  # bytes of NAME, so that `.NAME.partial-PID` is shorter than the 255 bytes that file systems allow


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists or cannot be made, before any work is done.

    Raises:
        UserError: it exists and may not be replaced, or its parent folder does not exist.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to nothing", "remove the link, or name another folder")
    if out.exists() and not (_is_bundle(out) or (out.is_dir() and not any(_entries(out)))):
        raise UserError(f"{out} exists already and is not a bundle", "name another folder")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already", "name another folder, or replace it: --overwrite or overwrite=True")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a folder", "name another folder")
    if not out.parent.exists():
        raise UserError(f"the folder {out.parent} does not exist", "make it first")


def _is_bundle(folder: Path) -> bool:
    """Whether it is a bundle, perhaps a damaged one. Other programs write a manifest.json too, for example web apps."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    return (folder / DATA_FILE).is_file() or b'"schema_version"' in manifest.read_bytes()


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder whose contents become those of ``out`` when the block ends without an error.

    A new ``out`` appears in one step. An existing ``out`` stays the same folder, because it may be a shell's current
    folder, a mount point or the target of a link. Its old contents are moved out and the new ones are moved in.
    If that fails, the old contents are moved back. If the process dies, the next call for ``out`` moves them back.

    Raises:
        UserError: as `check_output`, another process or thread is writing ``out``, or the system refuses to write
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
                check_output(out, overwrite)  # again, because the block may have taken hours
                _publish(folder, out)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if _name(out, "") in str(error.filename):
            error.filename = None  # users know the output, not the temporary files
        if (known := os_error(error, out)) is None:
            raise
        raise known from error


def _name(out: Path, kind: str) -> str:
    name = os.fsencode(out.name)
    if len(name) > LONGEST:
        name = name[: LONGEST - 9] + b"-" + hashlib.sha256(name).hexdigest()[:8].encode()
    return f".{os.fsdecode(name)}.{kind}"


def _home(out: Path) -> Path:
    """The folder for the temporary files: the parent of ``out``, or ``out`` if nothing can be moved between them."""
    if not out.is_dir():
        return out.parent
    name = _name(out, f"probe-{os.getpid()}{threading.get_ident()}")
    probe = out.parent / name
    try:
        probe.mkdir()
        os.rename(probe, out / name)
    except OSError:  # ``out`` is on another file system, or its parent is not writable
        return out
    finally:
        for place in (out, out.parent):
            with suppress(OSError):
                (place / name).rmdir()
    return out.parent


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold a lock file and remove it afterwards."""
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
        except FileNotFoundError:  # the last owner removed the file after we opened it
            os.close(handle)


def _publish(folder: Path, out: Path) -> None:
    """Replace the contents of ``out`` by those of ``folder``; after an error ``out`` has its old contents."""
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
    os.rename(replaced, folder)  # ``folder`` is empty; if we die now, the next process deletes it with the old contents


def _recover(home: Path, out: Path, spare: Path | None = None) -> None:
    """Restore the contents that ``out`` had before a process died or failed, and remove its temporary files."""
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
    """The entries of a folder, except the temporary files of this module."""
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
