"""Pointers of Git LFS: the small text that git leaves in the place of a large file which was not fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shadowllm.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Name the first file of which only the pointer is there.

    Raises:
        UserError: there is one.
    """
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path} is only a pointer of Git LFS, not the file", "fetch the files: git lfs pull")
