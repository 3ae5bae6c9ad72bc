"""Which of its two packages ONNX Runtime comes from. Both have the module ``onnxruntime``, so only one can be there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from shadowllm.errors import UserError

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # as distributions and as extras of shadowllm
INSTALL = "pip install 'shadowllm[onnxruntime]', or 'shadowllm[onnxruntime-gpu]' on a machine with an NVIDIA GPU"


def check_package() -> None:
    """Check, without importing ONNX Runtime, that it is installed once.

    Raises:
        UserError: no package has the module, or both packages are installed: then files of one have replaced those of
            the other.
    """
    if find_spec("onnxruntime") is None:
        raise UserError("ONNX Runtime is not installed", INSTALL)
    if all(_installed(package) for package in PACKAGES):
        raise UserError(
            f"the packages {' and '.join(PACKAGES)} are both installed, and each has overwritten files of the other",
            f"pip uninstall {' '.join(PACKAGES)}, then {INSTALL}",
        )


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
