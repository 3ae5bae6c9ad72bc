"""Compute capabilities: which image of a kernel a GPU runs."""

from __future__ import annotations

from collections.abc import Iterable

# "Capability" of PTX, and the one that it is for: it serves that and every later one.
PTX, PTX_SM = 0, 80


def serving(images: Iterable[int], sm: int) -> int | None:
    """Which image a GPU runs.

    Its own; else the newest before it of the same major version, as cubins are made to be compatible,
    except that from 9.0 on compilers make them for one GPU alone; else PTX.

    Args:
        images: compute capabilities there are images for, as 89 for 8.9, and `PTX`.
        sm: of the GPU.

    Returns:
        One of them, or None where none will do.
    """
    there = set(images)
    if sm in there:
        return sm
    older = [image for image in there if image != PTX and image // 10 == sm // 10 and image < sm < 90]
    if older:
        return max(older)
    return PTX if PTX in there and sm >= PTX_SM else None


def architectures(images: Iterable[int]) -> str:
    """Compute capabilities in words."""
    return ", ".join("PTX" if sm == PTX else f"sm_{sm}" for sm in images) or "no GPU"
