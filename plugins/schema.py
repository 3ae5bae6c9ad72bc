"""What a custom op's signature is made of; `registry.SCHEMAS` has those of all ops.

Domain ``shadowllm``, version 1. Shapes use batch B, seqlen S, hidden size D, intermediate size F,
query heads H of dimension d, and capacity C of the KV cache. Every index input is int32, ascending,
and carries a count; entries past the count are -1 and are never read.

A weight matrix may be of integers (see `bundle.quantisation`): its ``w_`` input is then uint8, ``(rows, D)``
for 8 bits or ``(rows, D/2)`` for 4, and its ``s_`` input holds the scales, ``(rows, blocks)``. A low-bit copy
always is, and its rows are cut into their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: as it stands in the ONNX function body.
        shape: symbolic dimensions; ``()`` is a scalar.
        dtype: "T" is the type of the weights and activations.
        optional: may be left out (an empty name in ONNX).
    """

    name: str
    shape: tuple[str, ...]
    dtype: Literal["T", "float32", "int32", "uint8"] = "T"
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """A node attribute: ``int`` or ``str``."""

    name: str
    type: type[int] | type[str]


@dataclass(frozen=True)
class OpSchema:
    """Signature of one custom op."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    doc: str
