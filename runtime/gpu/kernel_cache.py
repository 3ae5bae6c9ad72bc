"""Keeps the kernels that TensorRT-RTX compiles when an engine starts, for the next start.

TensorRT-RTX compiles machine code for the current GPU when it loads an engine. This code is specific to a user and a
machine, and bundles may be read-only, so it is stored in the user's cache folder.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any


def kernel_file(version: str, sm: int | None, engine_sha256: str) -> Path:
    """The file of an engine's kernels, in ``$XDG_CACHE_HOME/shadowllm`` or ``~/.cache/shadowllm``.

    Args:
        version: version of TensorRT-RTX.
        sm: compute capability of the GPU, as 89 for 8.9.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "shadowllm" / f"tensorrt_rtx-{version}-sm{sm}-{engine_sha256}.kernels"


class KernelCache:
    """An engine's ``IRuntimeCache``, loaded from a file.

    TensorRT-RTX refuses a damaged file, and a file of another version, GPU or driver. `save` then replaces it.

    Args:
        config: an ``IRuntimeConfig`` of the engine, which makes the cache.
        path: from `kernel_file`.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._config, self._path = config, path
        self._cache = config.create_runtime_cache()
        try:
            contents = path.read_bytes()
        except OSError:  # there is no file, or it is not readable: then `save` replaces it or warns
            contents = b""
        self._kept = contents if contents and self._cache.deserialize(contents) else b""

    def serve(self, config: Any) -> bool:
        """Let the contexts of a config use the cache; return whether TensorRT-RTX accepts this."""
        return bool(config.set_runtime_cache(self._cache))

    def save(self) -> None:
        """Write the file if the cache has new kernels; a failure is only a warning, because the session still works."""
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
