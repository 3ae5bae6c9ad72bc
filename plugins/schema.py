"""The classes that describe a custom op's signature; `registry.SCHEMAS` has the signatures of all ops.

The domain is ``shadowllm``, version 1. Shapes use batch B, seqlen S, hidden size D, intermediate size F,
query heads H of dimension d, and capacity C of the KV cache. Every index input is int32 and ascending,
and comes with a count. Entries past the count are -1 and are never read.

All sequences may share one selection, or each may have its own. This is told by ``count``: with the shape ``()`` there
is one, and with ``(B,)`` there is one for each sequence. Then ``indices``, ``chosen`` and the scores of neurons have a
first dimension B, and ``rest``, ``shortlist`` and ``certify`` have one number, or ``(B,)``. Results of a sequence are
then those that it has alone. The Triton kernels, and so the engines, take one selection only.

A weight matrix may be quantised (see `bundle.quantisation`). Its ``w_`` input is then uint8, ``(rows, D)``
for 8 bits or ``(rows, D/2)`` for 4, and its ``s_`` input holds the scales, ``(rows, blocks)``. A low-bit copy
is always quantised, and has a separate dimension for the blocks of a row. A ``w_`` input of integers without scales
is the residual of nested integers: a full row is the row of the copy plus that of the residual. It has the blocks of
the copy, and its bits follow from the bytes of its rows. The Triton kernels take floats and residuals, but no ``s_``
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Attributes = Mapping[str, int | float | str]  # of a node, by name


def copy_of(matrix: str) -> str:
    """The input with the low-bit copy of a matrix, which completes a residual."""
    return "copy" if matrix in ("table", "w") else f"c_{matrix.removeprefix('w_')}"


def scales_of(copy: str) -> str:
    """The input with the scales of a low-bit copy."""
    return "scales" if copy == "copy" else f"cs_{copy.removeprefix('c_')}"


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: as in the ONNX function body.
        shape: symbolic dimensions; ``()`` is a scalar.
        dtype: "T" is the type of the weights and activations.
        optional: may be absent (an empty name in ONNX).
    """

    name: str
    shape: tuple[str, ...]
    dtype: Literal["T", "float32", "int32", "uint8"] = "T"
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """A node attribute. One with a default may be absent."""

    name: str
    type: type[int] | type[str] | type[float]
    default: float | None = None


@dataclass(frozen=True)
class OpSchema:
    """Signature of one custom op."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    doc: str


def ports_of_part(prefix: str, part: OpSchema, *, computed: bool = True) -> tuple[Port, ...]:
    """The inputs of an op that is a part of another one, with a prefix.

    Args:
        prefix: of their names.
        part: its schema.
        computed: whether its first input is the result of another part. The node then does not have it.
    """
    first, *others = (replace(port, name=f"{prefix}_{port.name}") for port in part.inputs)
    return (replace(first, optional=True) if computed else replace(first, name=part.inputs[0].name), *others)
