"""Convert a checkpoint's integers and float8 back to floats, one tensor at a time, as compressed-tensors does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models.files.safetensors_file import SafetensorsFiles

SCALES = ("weight_scale", "weight_scale_inv")
# Scales of activations and of the KV cache. They are ignored, because both stay floats here.
ACTIVATION_SCALES = (
    "input_scale",
    "activation_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
)
PARTS = (*SCALES, "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", *ACTIVATION_SCALES)
PACKED_BITS = (4, 8)
WORD = 32
FLOATS = ("F64", "F32", "F16", "BF16")
DAMAGED = "the checkpoint is damaged: download it again, or use the model it was quantised from"


@dataclass(frozen=True)
class Layout:
    """What the config says about the stored weights. The defaults are for a config that says nothing.

    Attributes:
        block: rows and columns that share a scale, from the config or a default of the format; None if the tensor
            shapes alone define them.
        group_sizes: the possible numbers of columns that share a scale, -1 for all of them; empty if any number is.
        bits: the possible widths of packed integers.
        zero_points: whether stored zero points count.
        ordered: whether a stored order of the columns counts.
        floats_are_final: do not multiply a weight that is stored as floats by the scale beside it.
    """

    block: tuple[int, int] | None = None
    group_sizes: frozenset[int] = frozenset()
    bits: frozenset[int] = frozenset(PACKED_BITS)
    zero_points: bool = True
    ordered: bool = True
    floats_are_final: bool = False


class DequantisedTensors:
    """A quantised checkpoint, read as floats.

    ``X.weight`` is computed from ``X.weight`` or ``X.weight_packed``, ``X.weight_scale`` (or ``weight_scale_inv``) and
    ``X.weight_zero_point``.

    Args:
        tensors: the files.
        layout: what the config says about the weights.

    Attributes:
        dtypes: as in `SafetensorsFiles`; "F32" for dequantised tensors.
        short_scales: whether a scale has 16 bits.
        block: rows and columns that share a scale, from `Layout`.

    Raises:
        UserError: at `read`, if the parts of a weight are missing or do not fit together.
    """

    def __init__(self, tensors: SafetensorsFiles, layout: Layout) -> None:
        self._tensors, self._layout = tensors, layout
        self.block = layout.block
        names = tensors.names()
        modules = {name.rpartition(".")[0] for name in names if name.endswith((*SCALES, "weight_packed"))}
        plain = {name for name in names if name.rpartition(".")[2] not in PARTS}
        final = {name for name in plain if layout.floats_are_final and tensors.dtypes[name] in FLOATS}
        self._quantised = {f"{module}.weight" for module in modules} - final
        self._names = plain | self._quantised
        self.dtypes = {name: "F32" if name in self._quantised else tensors.dtypes[name] for name in self._names}

        self.short_scales = any(tensors.dtypes[name] in ("F16", "BF16") for name in names if name.endswith(SCALES))

    def names(self) -> set[str]:
        return set(self._names)

    def fingerprint(self) -> str:
        return self._tensors.fingerprint()

    def read(self, name: str) -> Tensor:
        if name not in self._quantised:
            return self._tensors.read(name)
        module = name.removesuffix(".weight")
        scale, weight, zero = self._scale(module), *self._integers(module)
        _require(weight.ndim == 2, f"{name} has {weight.ndim} dimensions, not 2")
        columns = self._part(module, "weight_g_idx") if self._layout.ordered else None
        # transformers, asked for float32, multiplies in float32 whatever the scales are.
        wide = weight.to(torch.float32, copy=True)  # and changed in place: large matrices take gigabytes
        if zero is not None:
            wide -= self._spread(name, zero.float(), wide.shape, columns)
        wide *= self._spread(name, scale.float(), wide.shape, columns)
        return wide

    def _integers(self, module: str) -> tuple[Tensor, Tensor | None]:
        """Return a module's weight as it is stored, but unpacked, and its zero points, if they count."""
        zero = self._part(module, "weight_zero_point") if self._layout.zero_points else None
        packed = self._part(module, "weight_packed")
        if packed is None:
            return self._needed(module, "weight"), zero
        shape = self._needed(module, "weight_shape").tolist()
        _require(isinstance(shape, list) and len(shape) == 2, f"{module}.weight_shape is {shape}, not two sizes")
        rows, width = shape
        name, bits = f"{module}.weight", self._layout.bits
        if zero is not None:
            zero = unpacked(zero.T, rows, name, bits).T
        return unpacked(packed, width, name, bits), zero

    def _part(self, module: str, part: str) -> Tensor | None:
        name = f"{module}.{part}"
        return self._tensors.read(name) if name in self._tensors.names() else None

    def _needed(self, module: str, part: str) -> Tensor:
        found = self._part(module, part)
        if found is None:
            raise UserError(f"the checkpoint lacks the tensor {module}.{part}", DAMAGED)
        return found

    def _scale(self, module: str) -> Tensor:
        present = [part for part in SCALES if f"{module}.{part}" in self._tensors.names()]
        _require(len(present) == 1, f"{module} has {' and '.join(present) or 'no scale'} beside its weight")
        scale = self._needed(module, present[0])
        # These scales are powers of two, stored as one exponent byte each. PyTorch cannot compute with this dtype.
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        _require(scale.dtype.is_floating_point, f"{module}.{present[0]} holds integers ({scale.dtype})")
        return scale

    def _spread(self, name: str, grid: Tensor, shape: torch.Size, columns: Tensor | None) -> Tensor:
        """Expand scales or zero points, one per tensor, row, group or block, to the weight's shape.

        An axis of size 1 is left to broadcasting.
        """
        if grid.numel() == 1:
            return grid.reshape(1, 1)
        grid = grid[:, None] if grid.ndim == 1 else grid
        misfit = f"the scales of {name} do not fit its shape: {tuple(grid.shape)} for {tuple(shape)}"
        _require(grid.ndim == 2 and grid.numel() > 0, misfit)
        self._check_groups(name, grid.shape[1], shape[1])
        if columns is not None and bool((columns >= 0).all()):  # it gives the group of each column
            fits = columns.shape == shape[1:] and int(columns.max()) < grid.shape[1] and len(grid) == shape[0]
            _require(fits, misfit)
            return grid[:, columns.long()]
        for axis in (0, 1):
            step = self._step(shape[axis], grid.shape[axis], axis)
            _require(step > 0, misfit)
            if grid.shape[axis] > 1:
                grid = grid.repeat_interleave(step, dim=axis)
        return grid[: shape[0], : shape[1]]

    def _check_groups(self, name: str, parts: int, width: int) -> None:
        sizes = sorted(self._layout.group_sizes)
        fits = not sizes or any(parts * (width if size < 0 else size) == width for size in sizes)
        said = " or ".join("all" if size < 0 else str(size) for size in sizes)
        _require(fits, f"{name} has {parts} scales for {width} columns, and config.json says that {said} share one")

    def _step(self, size: int, parts: int, axis: int) -> int:
        """Return how many rows or columns share a scale; 0 if the sizes do not fit."""
        given = self._layout.block[axis] if self._layout.block else 0
        if given > 0 and -(-size // given) == parts:
            return given  # the last block may be shorter
        return 0 if size % parts else size // parts


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(problem, DAMAGED)


def unpacked(words: Tensor, width: int, name: str, allowed: frozenset[int] = frozenset(PACKED_BITS)) -> Tensor:
    """Unpack integers of 4 or 8 bits from int32 ``(rows, words)``, lowest bits first, to int8 ``(rows, width)``.

    Args:
        allowed: the numbers of bits that the config gives.

    Raises:
        UserError: the number of bits is another one, or ``words`` are not rows of int32.
    """
    _require(words.ndim == 2 and words.dtype == torch.int32, f"{name} is not packed in rows of int32")
    # A single word can hold a few numbers of either width: then the config decides.
    fitting = [b for b in PACKED_BITS if -(-width * b // WORD) == words.shape[1]]
    bits = next((b for b in fitting if b in allowed), None)
    if bits is None:
        said = " nor ".join(map(str, sorted(allowed)))
        raise UserError(
            f"{name} is packed in {words.shape[1]} words for {width} weights, which is "
            f"{'neither' if len(allowed) > 1 else 'not'} {said} bits",
            "use the model it was quantised from",
        )
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values.flatten(1)[:, :width] - (1 << (bits - 1))).to(torch.int8)
