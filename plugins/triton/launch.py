"""Checks PyTorch tensors against an op's schema, and runs the op's schedules on them.

The ops as functions of tensors are in the ``launcher.py`` of their folders. They run on a CUDA device, or on the
CPU if ``TRITON_INTERPRET=1`` was set before Triton was imported. Nothing waits for the device, so all ops can be
captured in a CUDA graph. Contents are not checked: a count or a length is reduced to the capacity, a negative one is
taken for zero, and an index outside the weight is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from shadowllm.models.activations import Activation
from shadowllm.plugins.kernel_program import call_size
from shadowllm.plugins.schema import Attributes, OpSchema, copy_of
from shadowllm.plugins.triton.block_end import with_block_end
from shadowllm.plugins.triton.schedule import Planner, Schedule, Shape, cover, run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = get_args(Activation)


def check_activation(schema: OpSchema, activation: str) -> None:
    """Check that the kernels implement an activation.

    Raises:
        ValueError: they do not implement it.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{schema.name} has no activation {activation!r}, only {', '.join(ACTIVATIONS)}")


def check_rest(schema: OpSchema, rest: Tensor | None, copies: Mapping[str, Tensor | None], width: int) -> None:
    """Check that a rest and its low-bit copies are all there or all absent, and that the kernels can read the copies.

    Args:
        copies: integers ``c_...`` and scales ``cs_...``.
        width: length of a row before it was packed.

    Raises:
        ValueError: some are missing; or the blocks do not cover a row, or their size is not a power of two.
    """
    absent = [name for name, tensor in {"rest": rest, **copies}.items() if tensor is None]
    if absent and len(absent) <= len(copies):
        raise ValueError(f"{schema.name} has a part of what a rest needs, and no {', '.join(absent)}")
    for name, copy in copies.items():
        if copy is not None and copy.ndim == 3:
            check_copy(schema, name, copy, width)


def check_copy(schema: OpSchema, name: str, copy: Tensor, width: int) -> None:
    """Check that the kernels can read a low-bit copy ``(rows, blocks, bytes)`` of rows of this width.

    Raises:
        ValueError: it has no blocks; or they do not cover a row, or their size is not a power of two.
    """
    blocks, size = copy.shape[-2:] if copy.ndim == 3 else (0, 0)
    if size < 4 or size & (size - 1) or not (blocks - 1) * 2 * size < width <= blocks * 2 * size:
        raise ValueError(f"{schema.name}: {name} has shape {tuple(copy.shape)} for rows of {width}")


@dataclass(frozen=True)
class BlockInputs:
    """What makes ``SparseAttention`` or ``SparseMLP`` a whole block of a layer; see `block_end.with_block_end`.

    Attributes:
        skip: hidden states ``(B, 1, D)``, to which the result is added.
        norm_weight, norm_bias: ``(D,)``, of the norm after the addition; a bias makes it a LayerNorm.
        norm_eps: added to the variance.
        normed: ``(B, 1, D)``, written.
        output_norm_weight: ``(D,)``, if the result is normed before the addition.
        w_kv, b_kv: of attention's keys and values, one below the other.
        c_kv, cs_kv: the copy of ``w_kv`` and its scales, if ``w_kv`` is a residual.
    """

    skip: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    norm_eps: float
    normed: Tensor
    output_norm_weight: Tensor | None = None
    w_kv: Tensor | None = None
    b_kv: Tensor | None = None
    c_kv: Tensor | None = None
    cs_kv: Tensor | None = None


def launch_op(
    schema: OpSchema,
    planner: Planner,
    inputs: Mapping[str, Tensor | None],
    attributes: Attributes,
    chosen: Tensor | None,
    block: BlockInputs | None,
) -> Tensor:
    """Launch ``SparseAttention`` or ``SparseMLP``, alone or as a block, and return y.

    Raises:
        ValueError: see `launch`; or a block of more than one token per sequence.
    """
    x = inputs["x"]
    assert x is not None
    y, outputs = torch.empty_like(x), [] if chosen is None else [chosen]
    if block is None:
        launch(schema, planner, inputs, attributes, y, *outputs)
        return y
    if x.ndim != 3 or x.shape[1] != 1 or (block.w_kv is not None and schema.name != "SparseAttention"):
        raise ValueError(f"{schema.name} is no block of a layer for x {tuple(x.shape)}")
    more = {name: tensor for name, tensor in vars(block).items() if name not in ("normed", "norm_eps")}
    if schema.name != "SparseAttention":
        more = {name: tensor for name, tensor in more.items() if not name.endswith("_kv")}
    attributes = {**attributes, "norm_eps": block.norm_eps}
    launch(with_block_end(schema), planner, {**inputs, **more}, attributes, y, block.normed, *outputs)
    return y


def launch(
    schema: OpSchema,
    planner: Planner,
    inputs: Mapping[str, Tensor | None],
    attributes: Attributes,
    *outputs: Tensor,
) -> None:
    """Launch an op.

    Args:
        inputs: tensors by the schema's names; None if absent. The shape of the first one gives batch and seqlen.
        outputs: the tensors to write, in the order of the schema.

    Raises:
        ValueError: a tensor does not match the schema in type, device, layout or shape.
    """
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    _check(schema, present)
    batch, seqlen = call_size(present[schema.inputs[0].name].shape)
    present = {name: _words(t, present.get(copy_of(name))) for name, t in present.items()}
    planned = _planned(
        planner,
        tuple((name, tuple(tensor.shape[-2:] if name == "x" else tensor.shape)) for name, tensor in present.items()),
        tuple(attributes.items()),
        next(tensor.element_size() for tensor in present.values() if tensor.dtype in FLOATS),
        _limit(batch),
        _limit(seqlen),
    )
    written = {port.name: tensor for port, tensor in zip(schema.outputs, outputs, strict=False)}
    run(cover(planned, batch, seqlen), {**present, **written}, batch, seqlen)


def _words(tensor: Tensor, copy: Tensor | None) -> Tensor:
    """Packed integers as the words that the kernels read, as in an engine; a residual has the words of its copy."""
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor.view(torch.int32) if copy is None else residual_words(copy, tensor)


def residual_words(copy: Tensor, residual: Tensor) -> Tensor:
    """A residual uint8 ``(rows, bytes)`` of a copy ``(rows, blocks, bytes)`` as words of eight integers, see `low_bit`.

    Returns:
        int32 or int16 ``(rows, blocks, words)``.
    """
    _, blocks, size = copy.shape
    word = torch.int32 if residual.shape[1] == blocks * size else torch.int16
    return residual.view(word).unflatten(1, (blocks, size // 4))


def _limit(size: int) -> int:
    """The next power of two, so that few plans serve all sizes; scratch memory at most doubles per dimension."""
    return 1 << (size - 1).bit_length()


@lru_cache(maxsize=256)
def _planned(
    planner: Planner,
    shapes: tuple[tuple[str, Shape], ...],
    attributes: tuple[tuple[str, int | float | str], ...],
    itemsize: int,
    max_batch: int,
    max_seqlen: int,
) -> list[Schedule]:
    return planner(dict(shapes), dict(attributes), itemsize=itemsize, max_batch=max_batch, max_seqlen=max_seqlen)


def _check(schema: OpSchema, tensors: Mapping[str, Tensor]) -> None:
    """Check types, devices, layouts and shapes against the schema.

    Raises:
        ValueError: a tensor does not match; the message names the first one.
    """
    known: dict[str, int] = {}
    types = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}
    first = next(iter(tensors.values()))
    for port in schema.inputs:
        tensor = tensors.get(port.name)
        if tensor is None:
            continue
        where = f"{schema.name}: {port.name}"
        shape = port.shape
        if tensor.dtype == torch.uint8 and port.dtype == "T" and copy_of(port.name) in tensors:
            shape = (port.shape[0], f"bytes of the residual {port.name}")
        elif tensor.dtype != types.setdefault(port.dtype, tensor.dtype) or (
            port.dtype == "T" and tensor.dtype not in FLOATS
        ):
            raise ValueError(f"{where} is {tensor.dtype}, expected {types.get(port.dtype, FLOATS)}")
        if tensor.device != first.device or not tensor.is_contiguous():
            raise ValueError(f"{where} must be contiguous and on {first.device}")
        sizes = dict(zip(shape, tensor.shape, strict=False))
        if tensor.ndim != len(shape) or any(known.setdefault(s, size) != size for s, size in sizes.items()):
            raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {list(shape)} with {known}")
    _check_residuals(schema, tensors)


def _check_residuals(schema: OpSchema, tensors: Mapping[str, Tensor]) -> None:
    """Check that all matrices with a copy are residuals, or none, and that residuals have 4 or 2 bits."""
    matrices = [port.name for port in schema.inputs if copy_of(port.name) in tensors]
    residuals = [name for name in matrices if name in tensors and tensors[name].dtype == torch.uint8]
    if residuals and len(residuals) < len(matrices):
        raise ValueError(f"{schema.name}: {residuals[0]} is a residual of a low-bit copy, and not all of {matrices}")
    for name in residuals:
        (_, blocks, size), (_, found) = tensors[copy_of(name)].shape, tensors[name].shape
        if found not in (blocks * size, blocks * size // 2):
            raise ValueError(f"{schema.name}: {name} has rows of {found} bytes, and its copy {blocks * size}")
