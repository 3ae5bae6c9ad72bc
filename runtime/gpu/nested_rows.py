"""A matrix of nested integers on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shadowllm.plugins.ops.nested_gather.launcher import nested_gather
from shadowllm.plugins.ops.nested_linear.launcher import nested_linear


@dataclass(frozen=True)
class NestedRows:
    """A matrix ``(rows, width)`` of nested integers on a device; see `bundle.quantisation`.

    Attributes:
        copy: uint8 ``(rows, blocks, bytes)``.
        scales: of the copy, float32 ``(rows, blocks)``.
        residual: uint8 ``(rows, bytes)``.
        width: elements of a row, without the padding of the last block.
    """

    copy: Tensor
    scales: Tensor
    residual: Tensor
    width: int

    def split(self, sizes: Sequence[int]) -> list[NestedRows]:
        """Parts with these numbers of rows, which share the memory of the matrix."""
        copies, scales, residuals = (part.split(list(sizes)) for part in (self.copy, self.scales, self.residual))
        return [NestedRows(*part, self.width) for part in zip(copies, scales, residuals, strict=True)]

    def values(self, rows: Tensor) -> Tensor:
        """The values of some rows, float32.

        Args:
            rows: integers of any shape ``(...)`` on the device.

        Returns:
            ``(..., width)``.
        """
        ids = rows.flatten().int()
        found = nested_gather(ids, self.residual, self.copy, self.scales, width=self.width)
        return found.view(*rows.shape, self.width)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by all rows, as ``torch.nn.functional.linear``; sums are in float32.

        Args:
            x: floats ``(..., width)`` on the device.
            bias: ``(rows,)`` of the type of x.

        Returns:
            ``(..., rows)`` of the type of x.

        Raises:
            ValueError: x has another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"x has shape {tuple(x.shape)}, and a row has {self.width} elements")
        flat = x.reshape(-1, self.width).contiguous()
        y = nested_linear(flat, self.residual, self.copy, self.scales, bias)
        return y.view(*x.shape[:-1], len(self.copy))
