"""Find the kernel image that a GPU runs, by compute capability."""

from __future__ import annotations

from collections.abc import Iterable

# The number that stands for PTX, and the capability it is compiled for. It runs on that and every later one.
PTX, PTX_SM = 0, 80


def serving(images: Iterable[int], sm: int) -> int | None:
    """Return the image that a GPU runs.

    The first choice is the GPU's own image. The second is the newest older image of the same major version,
    because cubins are compatible within it. From 9.0 on, cubins are for one GPU only. The last choice is PTX.

    Args:
        images: compute capabilities that have an image, as 89 for 8.9, and `PTX`.
        sm: compute capability of the GPU.

    Returns:
        One of ``images``, or None if none runs on the GPU.
    """
    available = set(images)
    if sm in available:
        return sm
    older = [image for image in available if image != PTX and image // 10 == sm // 10 and image < sm < 90]
    if older:
        return max(older)
    return PTX if PTX in available and sm >= PTX_SM else None


def architectures(images: Iterable[int]) -> str:
    """Describe compute capabilities in words."""
    return ", ".join("PTX" if sm == PTX else f"sm_{sm}" for sm in images) or "no GPU"
