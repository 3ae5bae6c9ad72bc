"""Find the kernel image that a GPU runs, by compute capability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shadowllm.errors import UserError

# Compilers of CUDA 13 make the images. Their format for these GPUs is new in CUDA 13, whose first driver is this one.
NEW_FORMAT_SM, NEW_FORMAT_DRIVER = 90, 580
# The number that stands for PTX, and the capability it is compiled for. It runs on that and every later one.
PTX, PTX_SM = 0, 80
# The first GPUs with programmatic dependent launch (`plugins.triton.compile` explains it).
DEPENDENT_LAUNCH_SM = 90


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


def with_fallback(sms: Sequence[int]) -> tuple[int, ...]:
    """Add PTX to images that an older driver may not know. It compiles the PTX when a kernel is loaded."""
    return (*sms, PTX) if PTX not in sms and any(sm >= NEW_FORMAT_SM for sm in sms) else tuple(sms)


def check_dependent_launch(sms: Iterable[int]) -> None:
    """Check that GPUs have programmatic dependent launch.

    Args:
        sms: their compute capabilities; `PTX` is ignored, because such a kernel is launched without it.

    Raises:
        UserError: one is too old.
    """
    if old := [sm for sm in sms if sm != PTX and sm < DEPENDENT_LAUNCH_SM]:
        raise UserError(
            f"sm_{old[0]} has no programmatic dependent launch, which begins with sm_{DEPENDENT_LAUNCH_SM}",
            "leave out --programmatic-dependent-launch, or build for later GPUs only, as --sm 120",
        )


def architectures(images: Iterable[int]) -> str:
    """Describe compute capabilities in words."""
    return ", ".join("PTX" if sm == PTX else f"sm_{sm}" for sm in images) or "no GPU"
