"""The signature of ``LinearW8A8``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.schema import OpSchema, Port

LINEAR_W8A8 = OpSchema(
    name="LinearW8A8",
    inputs=(
        Port("x", ("T", "K"), "float32"),
        Port("w", ("N", "blocks", "block"), "uint8"),
        Port("scales", ("N", "blocks"), "float32"),
        Port("bias", ("N",), "float32", optional=True),
    ),
    outputs=(Port("y", ("T", "N"), "float32"),),
    attributes=(),
    doc="A linear layer with weights of 8 bits, whose inputs are rounded to 8 bits with a scale per block: the product "
    "that MatMulNBits computes with accuracy_level 4. The weights are unsigned integers around 128, and the last block "
    "may reach beyond the end of x. Every row of y has the bits that it has alone. Blocks of 64 elements are "
    "multiplied as integers; with others, and without AVX2, x is not rounded.",
)
