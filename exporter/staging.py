"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowllm.errors import UserError


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work is done.

    Raises:
        UserError: it exists and may not be replaced, or its parent does not exist.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already", "name another folder, or replace it with --overwrite")
    if out.exists() and not ((out / "manifest.json").is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} is not a bundle, so it is not overwritten", "name another folder")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", "make it first")


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name when the block ends without an error.

    What a killed process left behind is removed by the next one that stages the same folder.

    Raises:
        UserError: as `check_output`, or the disk is full.
    """
    out = out.absolute()
    check_output(out, overwrite)
    _remove_leftovers(out)
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        folder.mkdir()
        yield folder
        _replace(folder, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror or error})", "free disk space or name a folder you may write to"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        os.rename(out, old)
    os.rename(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    for kind in ("partial", "replaced"):
        for path in out.parent.glob(f".{out.name}.{kind}-*"):
            pid = path.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)
