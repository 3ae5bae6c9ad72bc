"""Kernels that TensorRT-RTX compiles as an engine starts, kept for the next start.

Its engines say what is to be computed, and machine code for the GPU at hand is made when they are loaded. The
code belongs to a user and a machine, and bundles may be read-only: so it lies in the user's cache folder.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any


def kernel_file(version: str, sm: int | None, engine_sha256: str) -> Path:
    """Where an engine's kernels are kept: in ``$XDG_CACHE_HOME/shadowllm`` or ``~/.cache/shadowllm``.

    Args:
        version: of TensorRT-RTX.
        sm: compute capability of the GPU, as 89 for 8.9.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "shadowllm" / f"tensorrt_rtx-{version}-sm{sm}-{engine_sha256}.kernels"


class KernelCache:
    """An engine's ``IRuntimeCache``, filled from a file.

    TensorRT-RTX itself refuses a damaged file, or one of another version, GPU or driver; it is then replaced.

    Args:
        config: an ``IRuntimeConfig`` of the engine, which makes the cache.
        path: from `kernel_file`.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._config, self._path = config, path
        self._cache = config.create_runtime_cache()
        try:
            contents = path.read_bytes()
        except OSError:  # none yet; or not ours to read, and then `save` replaces it or says that it cannot
            contents = b""
        self._kept = contents if contents and self._cache.deserialize(contents) else b""

    def serve(self, config: Any) -> bool:
        """Have contexts of a config take kernels out of the cache and put theirs in; whether TensorRT-RTX agrees."""
        return bool(config.set_runtime_cache(self._cache))

    def save(self) -> None:
        """Write the file, if anything is new. Where that cannot be, a warning says so, for the work itself is done."""
        blob = self._cache.serialize()
        contents = b"" if blob is None else bytes(blob)
        if not contents or contents == self._kept:
            return
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(contents)
            os.replace(part, self._path)
            self._kept = contents
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            message = f"cannot keep compiled kernels in {self._path.parent} ({error.strerror}); the next start compiles"
            warnings.warn(f"{message} them again; XDG_CACHE_HOME names another folder", RuntimeWarning, stacklevel=2)
