"""Finds the native custom ops for ONNX Runtime on CPU and registers them with a session.

Without them a graph still runs through its function bodies (`function_body`), but more slowly.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm import plugins
from shadowllm.errors import UserError

if TYPE_CHECKING:
    import onnxruntime as ort

FILE_NAME = "libshadowllm_native.so"
PATH_VARIABLE = "SHADOWLLM_NATIVE_OPS"  # a library built by hand
ISA_VARIABLE = "SHADOWLLM_NATIVE_ISA"  # kernels to use instead of the best ones; see `kernels`


def library() -> Path | None:
    """The native library: the file that ``SHADOWLLM_NATIVE_OPS`` names, or the one installed with this package.

    Raises:
        UserError: the variable names a file that does not exist.
    """
    given = os.environ.get(PATH_VARIABLE)
    if given:
        if not Path(given).is_file():
            raise UserError(f"{PATH_VARIABLE} names {given}, which is no file", f"unset {PATH_VARIABLE} or correct it")
        return Path(given).resolve()
    # An editable install keeps compiled files and sources in two folders; the package's path has both.
    found = (Path(folder) / FILE_NAME for folder in plugins.__path__)
    return next((path.resolve() for path in found if path.is_file()), None)


def register(session_options: ort.SessionOptions) -> bool:
    """Let sessions made with these options run the custom ops natively.

    Returns:
        Whether the native ops are registered. If not, a warning (once per process) explains how to get the library.

    Raises:
        UserError: see `library`, or ``SHADOWLLM_NATIVE_ISA`` names no kernels of this CPU.
    """
    path, isa = library(), os.environ.get(ISA_VARIABLE)
    names = kernels() if isa else ()
    if names and isa not in names:
        raise UserError(
            f"{ISA_VARIABLE} is '{isa}', but this CPU runs {','.join(names)}",
            f"unset {ISA_VARIABLE} or give it one of these names",
        )
    if path is None:
        _warn_once(
            f"there are no compiled ops in {Path(plugins.__path__[0])}, so sparse layers run at the speed of their "
            "function bodies; install a C++ compiler, then in the checkout: pip install --editable ."
        )
        return False
    try:
        session_options.register_custom_ops_library(str(path))
    except _load_errors() as error:
        _warn_once(
            f"the native ops in {path} do not load, so sparse layers run at the speed of their function "
            f"bodies; reinstall shadowllm on this machine, with onnxruntime 1.32 or later ({error})"
        )
        return False
    return True


def kernels() -> tuple[str, ...]:
    """Names of the kernels that this CPU can run, best first, e.g. ``("avx512", "avx2", "portable")``.

    Empty without a library that loads. The variable ``SHADOWLLM_NATIVE_ISA`` selects one of them for new sessions.
    """
    path = library()
    if path is None:
        return ()
    try:
        query = ctypes.CDLL(str(path)).shadowllm_native_kernels
    except (OSError, AttributeError):  # `register` says what is wrong
        return ()
    query.restype = ctypes.c_char_p
    return tuple(query().decode().split(","))


def linear_pays() -> bool:
    """Return whether ``NestedLinear`` is faster than ONNX Runtime's ``MatMulNBits``, as far as was measured.

    This depends on the kernels that run. AVX-512 without VNNI was not measured. The portable kernels convert bytes to
    floats.
    """
    names = kernels()
    return bool(names) and (os.environ.get(ISA_VARIABLE) or names[0]) in ("avx2", "avx512vnni")


def _load_errors() -> tuple[type[Exception], ...]:
    """Exceptions that ONNX Runtime raises if it cannot open a library or the library refuses to register."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.InvalidArgument, state.RuntimeException, state.NotImplemented)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
