"""The signature of ``NestedGather``, which only engines have; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

NESTED_GATHER = OpSchema(
    name="NestedGather",
    inputs=(
        Port("ids", ("R",), "int32"),
        Port("w", ("N", "bytes"), "uint8"),
        Port("copy", ("N", "copy_blocks", "copy_bytes"), "uint8"),
        Port("scales", ("N", "copy_blocks"), "float32"),
    ),
    outputs=(Port("y", ("R", "width"), "float32"),),
    attributes=(Attribute("width", int),),
    doc="The rows of a matrix of nested integers with the given numbers, as floats: the first width elements of each. "
    "w is the residual of the copy. The sum of two GatherBlockQuantized, which a bundle's graphs have.",
)
