"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the bytes of files, in the order given, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
