"""Git LFS pointers: small text files that git leaves in place of large files that were not fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shadowllm.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse files that are only Git LFS pointers.

    Raises:
        UserError: a file is a pointer; the message names the first one.
    """
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path} is only a pointer of Git LFS, not the file", "fetch the files: git lfs pull")
