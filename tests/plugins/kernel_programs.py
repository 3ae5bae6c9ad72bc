"""Small programs made by hand. Their images are no real kernels, but only a GPU could notice that."""

from __future__ import annotations

from shadowllm.bundle.gpu_images import DEPENDENT_LAUNCH_SM, PTX
from shadowllm.plugins.kernel_program import Argument, Image, Kernel, Launch, Output, Plan, Program, Size

CUBIN = b"\x7fELF\0\1\2\0"


def program(dtype: str = "float16", sms: tuple[int, ...] = (80, 90, PTX), waits: bool = False) -> Program:
    """Two kernels, the second with much shared memory; a plan for one token, and one for calls up to (4, 128).

    Args:
        waits: whether the images for GPUs with programmatic dependent launch wait.
    """
    grid = (Size(576, divisor=64), Size(batch=True), Size(batch=True, seqlen=True, divisor=16))
    first = Launch(
        0, grid, (Argument("input", 1, offset=24), Argument("workspace", 512), Argument("int", 0, Size(576)))
    )
    second = Launch(
        1,
        (Size(3), Size(), Size()),
        (
            Argument("workspace"),
            Argument("output"),
            Argument("input"),
            Argument("int", 0, Size(2, batch=True, seqlen=True, divisor=3)),
        ),
    )
    early = {sm: waits and sm >= DEPENDENT_LAUNCH_SM for sm in sms}
    kernels = (
        Kernel("first", 128, 2, tuple(Image(sm, 4096 + sm, image("one", sm, 5), early[sm]) for sm in sms)),
        Kernel("second", 256, 0, tuple(Image(sm, 99000 - sm, image("two", sm, 4), early[sm]) for sm in sms)),
    )
    plans = (Plan(1, 1, 1024, (second,)), Plan(4, 128, 65536, (first, second)))
    return Program((dtype, "int32", "float32"), (Output(dtype, ((0, 0), (0, 1), 576)),), kernels, plans)


def image(name: str, sm: int, parameters: int) -> bytes:
    """An image that the tests' fake driver accepts as a kernel."""
    return f"{name}-{sm}".encode() + b" .param ." * parameters + CUBIN
