"""The signature of ``NestedLinear``, which no bundle has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.schema import OpSchema, Port

NESTED_LINEAR = OpSchema(
    name="NestedLinear",
    inputs=(
        Port("x", ("R", "D")),
        Port("w", ("N", "bytes"), "uint8"),
        Port("copy", ("N", "copy_blocks", "copy_bytes"), "uint8"),
        Port("scales", ("N", "copy_blocks"), "float32"),
        Port("bias", ("N",), optional=True),
    ),
    outputs=(Port("y", ("R", "N")),),
    attributes=(),
    doc="A linear layer with a matrix of nested integers: the products of each row of x with all rows of the matrix, "
    "plus bias. w is the residual of the copy. The last block of a row may reach beyond the end of x. The sum of two "
    "MatMulNBits, which a bundle's graphs have. As these do with accuracy_level 4, the native op rounds x to 8 bits "
    "with a scale per block, which must have 64 elements. It does not if it is told not to, or has no integer kernels. "
    "Every row of y has the bits that it has alone.",
)
