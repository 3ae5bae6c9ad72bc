"""Integers and float8 of a checkpoint turned back into floats, one tensor at a time, as compressed-tensors does it."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models.safetensors_file import SafetensorsFiles

SCALES = ("weight_scale", "weight_scale_inv")
# Of activations and of the cache, which stay floats here.
ACTIVATION_SCALES = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
PARTS = (*SCALES, "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", *ACTIVATION_SCALES)
PACKED_BITS = (4, 8)
WORD = 32


class DequantisedTensors:
    """A quantised checkpoint as one of floats: ``X.weight`` is made of ``X.weight`` or ``X.weight_packed``,
    ``X.weight_scale`` (or ``weight_scale_inv``) and ``X.weight_zero_point``.

    Args:
        tensors: the files.
        block: rows and columns that share a scale, where the sizes do not say so by themselves.

    Attributes:
        dtypes: as of `SafetensorsFiles`; "F32" for what is dequantised.
    """

    def __init__(self, tensors: SafetensorsFiles, block: tuple[int, int] | None = None) -> None:
        self._tensors, self._block = tensors, block
        names = tensors.names()
        modules = {name.rpartition(".")[0] for name in names if name.endswith(SCALES)}
        self._quantised = {f"{module}.weight" for module in modules}
        plain = {name for name in names if name.rpartition(".")[2] not in PARTS}
        self._names = plain | self._quantised
        self.dtypes = {name: "F32" if name in self._quantised else tensors.dtypes[name] for name in self._names}

    def names(self) -> set[str]:
        return set(self._names)

    def fingerprint(self) -> str:
        return self._tensors.fingerprint()

    def read(self, name: str) -> Tensor:
        if name not in self._quantised:
            return self._tensors.read(name)
        module = name.removesuffix(".weight")
        scale = next(s for part in SCALES if (s := self._part(module, part)) is not None)
        zero = self._part(module, "weight_zero_point")
        packed = self._part(module, "weight_packed")
        if packed is None:
            weight = self._tensors.read(name)
        else:
            rows, width = self._tensors.read(f"{module}.weight_shape").tolist()
            weight = unpacked(packed, width, name)
            if zero is not None:
                zero = unpacked(zero.T, rows, name).T
        return self._dequantised(name, weight, scale, zero, self._part(module, "weight_g_idx"))

    def _part(self, module: str, part: str) -> Tensor | None:
        name = f"{module}.{part}"
        return self._tensors.read(name) if name in self._tensors.names() else None

    def _dequantised(
        self, name: str, weight: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        # In the type of the scales, as compressed-tensors multiplies.
        wide = weight.to(scale.dtype)
        if zero is not None:
            wide = wide - self._spread(name, zero.to(scale.dtype), wide.shape, columns)
        return wide * self._spread(name, scale, wide.shape, columns)

    def _spread(self, name: str, grid: Tensor, shape: torch.Size, columns: Tensor | None) -> Tensor:
        """Scales or zero points so that each weight meets its own: of a tensor, of rows, of groups or of blocks."""
        if grid.numel() == 1:
            return grid.reshape(1, 1)
        grid = grid[:, None] if grid.ndim == 1 else grid
        if columns is not None and bool((columns >= 0).all()):
            return grid[:, columns.long()]  # groups in an order of their own
        for axis in (0, 1):
            step = self._step(name, shape[axis], grid.shape[axis], axis)
            grid = grid.repeat_interleave(step, dim=axis)
        return grid[: shape[0], : shape[1]]

    def _step(self, name: str, size: int, parts: int, axis: int) -> int:
        given = self._block[axis] if self._block else 0
        if given > 0 and -(-size // given) == parts:
            return given  # the last block may be shorter
        if size % parts:
            raise UserError(
                f"the scales of {name} do not fit its shape: {parts} for {size}", "the checkpoint is damaged"
            )
        return size // parts


def unpacked(words: Tensor, width: int, name: str) -> Tensor:
    """Integers of 4 or 8 bits out of int32 ``(rows, words)``, lowest bits first: int8 ``(rows, width)``.

    Raises:
        UserError: another number of bits.
    """
    bits = next((b for b in PACKED_BITS if -(-width * b // WORD) == words.shape[1]), None)
    if bits is None:
        raise UserError(
            f"{name} is packed in {words.shape[1]} words for {width} weights, which is neither 4 nor 8 bits",
            "use the model it was quantised from",
        )
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values.flatten(1)[:, :width] - (1 << (bits - 1))).to(torch.int8)
