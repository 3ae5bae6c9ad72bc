"""What a plugin node is: its op, its attributes and which optional inputs it has.

Plain Python, so that shapes, types and the serialised form can be tested without TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from shadowllm.plugins.schemas import OpSchema, Port

INPUT_MASK = "input_mask"
Dimension = TypeVar("Dimension")


@dataclass(frozen=True)
class PluginState:
    """All a plugin instance carries; the engine stores it as the plugin's fields.

    Attributes:
        schema: the op.
        attributes: value of each attribute in ``schema.attributes``.
        input_mask: bit i is set if input i of the schema is present. TensorRT has no empty inputs,
            so the node's inputs are the present ones, closed up.
    """

    schema: OpSchema
    attributes: Mapping[str, int | str]
    input_mask: int

    def __post_init__(self) -> None:
        wanted = {attribute.name: attribute.type for attribute in self.schema.attributes}
        if {name: type(value) for name, value in self.attributes.items()} != wanted:
            raise ValueError(f"{self.schema.name} has attributes {dict(self.attributes)}, expected {wanted}")
        required = input_mask(not port.optional for port in self.schema.inputs)
        if self.input_mask & required != required or self.input_mask >> len(self.schema.inputs):
            raise ValueError(f"{self.schema.name} cannot have the inputs of mask {self.input_mask:#b}")

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """The present inputs, in the order of the node."""
        return tuple(port for i, port in enumerate(self.schema.inputs) if self.input_mask >> i & 1)

    @property
    def fields(self) -> dict[str, int | str]:
        """What is serialised; `from_fields` reads it back."""
        return {**self.attributes, INPUT_MASK: self.input_mask}

    @classmethod
    def from_fields(cls, schema: OpSchema, fields: Mapping[str, int | str]) -> PluginState:
        """Inverse of `fields`; others than the op's own are left alone.

        Raises:
            ValueError: a field is missing or of another type.
        """
        mask = fields.get(INPUT_MASK)
        if not isinstance(mask, int):
            raise ValueError(f"{schema.name} carries no {INPUT_MASK}: the graph was not prepared for TensorRT")
        names = [attribute.name for attribute in schema.attributes if attribute.name in fields]
        return cls(schema, {name: fields[name] for name in names}, mask)

    def output_shapes(self, inputs: Sequence[Sequence[Dimension]]) -> list[list[Dimension | int]]:
        """Shape of each output from those of the present inputs, symbol by symbol.

        A symbol of the schema is the dimension of the first input that has it, or an attribute.

        Raises:
            ValueError: an input is missing or has another number of dimensions.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{self.schema.name} got {len(inputs)} inputs, expected {len(self.inputs)}")
        known: dict[str, Dimension | int] = {}
        for port, shape in zip(self.inputs, inputs, strict=True):
            if len(shape) != len(port.shape):
                raise ValueError(
                    f"input {port.name} of {self.schema.name} has {len(shape)} dimensions, expected {list(port.shape)}"
                )
            for symbol, size in zip(port.shape, shape, strict=True):
                known.setdefault(symbol, size)
        known |= {name: value for name, value in self.attributes.items() if isinstance(value, int)}
        return [[known[symbol] for symbol in port.shape] for port in self.schema.outputs]

    @property
    def ports(self) -> tuple[Port, ...]:
        """Present inputs, then outputs: the order in which TensorRT asks for formats."""
        return self.inputs + self.schema.outputs

    @property
    def typed_input(self) -> int:
        """Position of the input that decides the type T, -1 where the op has no T."""
        return next((i for i, port in enumerate(self.inputs) if port.dtype == "T"), -1)


def input_mask(present: Iterable[bool]) -> int:
    """Bit i is set if the i-th is true."""
    return sum(1 << i for i, there in enumerate(present) if there)
