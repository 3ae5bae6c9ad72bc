"""Imports TensorRT; the rest of the package gets the TensorRT module as an argument ``trt``.

TensorRT-RTX (GeForce and RTX cards, builds without a GPU) and the full TensorRT (data-centre cards,
builds on the target card) have the same Python interface under two module names, called *flavours*.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from shadowllm.config import Flavour
from shadowllm.errors import UserError

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def require(flavour: Flavour) -> None:
    """Check, without importing TensorRT, that engines of this flavour can be built here.

    Raises:
        UserError: the flavour is unknown, a package is missing, or "tensorrt" has no GPU.
    """
    if flavour not in FLAVOURS:
        raise UserError(f"there is no engine flavour {flavour!r}", f"choose one of {', '.join(FLAVOURS)}")
    no_gpu = flavour == "tensorrt" and gpu_capability() is None
    for package in (flavour, "polygraphy", "cuda.bindings"):
        if not _installed(package):
            raise UserError(
                f"the package {package} is not installed{', and there is no NVIDIA GPU here' * no_gpu}",
                f"pip install 'shadowllm[{EXTRAS[flavour]}]'",
            )
    if no_gpu:
        raise UserError(
            "the builder of tensorrt needs an NVIDIA GPU and driver, and this machine has none",
            "use --engine tensorrt_rtx, which builds without a GPU, or build on the target machine",
        )


def load(flavour: Flavour) -> Any:
    """Import TensorRT of this flavour and make Polygraphy use the same one.

    A process can load only one flavour, because Polygraphy chooses once, when it is imported.

    Raises:
        UserError: see `require`.
    """
    require(flavour)
    # Polygraphy reads this variable at its first import, to choose the module.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavour == "tensorrt_rtx" else "0"
    config = importlib.import_module("polygraphy.config")
    if config.USE_TENSORRT_RTX is not (flavour == "tensorrt_rtx"):
        raise RuntimeError(f"Polygraphy was imported for the other flavour before {flavour} was asked for")
    return importlib.import_module(flavour)


def known_targets(flavour: Flavour) -> list[int]:
    """The compute capabilities that the builder of TensorRT-RTX knows, as 89 for 8.9."""
    names = importlib.import_module(flavour).ComputeCapability.__members__
    return sorted(int(name[2:]) for name in names if name.startswith("SM"))


def targets(flavour: Flavour, sms: Sequence[int]) -> list[int]:
    """The compute capabilities that an engine will run on, if a build names ``sms``."""
    if flavour == "tensorrt":
        capability = gpu_capability()
        return [] if capability is None else [capability]
    # By default TensorRT-RTX builds for every GPU from Ampere on. Turing must be requested.
    return sorted(set(sms)) or [sm for sm in known_targets(flavour) if sm >= 80]


@contextmanager
def child_environment(flavour: Flavour) -> Iterator[dict[str, str]]:
    """Environment for a child process that parses ONNX with this flavour.

    The parser of TensorRT-RTX opens "libtensorrt_rtx.so", but the wheel has only the name with a version suffix.
    If the name is not found, the process dies without a message. So a temporary folder with links of the plain names
    is added to the loader's path. A child process is needed because the loader reads this path only at process start.
    """
    with tempfile.TemporaryDirectory(prefix="shadowllm-") as folder:
        for library in _libraries(flavour):
            Path(folder, library.name.split(".so")[0] + ".so").symlink_to(library)
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        # The child compiles kernels, even if this process interprets them.
        yield os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}


def gpu_capability() -> int | None:
    """Compute capability of the first GPU, e.g. 89 for 8.9; None without a driver or a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value, parts = ctypes.c_int(), ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        parts.append(value.value)
    return 10 * parts[0] + parts[1]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _libraries(flavour: Flavour) -> list[Path]:
    """Versioned shared libraries of the flavour's wheel; empty if the system's libraries are used."""
    spec = importlib.util.find_spec(f"{flavour}_libs")
    if spec is None or spec.origin is None:
        return []
    return sorted(Path(spec.origin).parent.glob("*.so.*"))
