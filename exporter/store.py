"""The one external-data file that all pieces of a bundle share.

Tensors that a dense graph multiplies together (q, k, v; gate, up) lie back to back, so that a graph
may name the run of them as a single initializer while a sparse graph names one of them alone:
several views of the same bytes, and every weight on disk once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir
import torch

from shadowllm.errors import UserError
from shadowllm.models import ModelSpec
from shadowllm.models.weights import tensor_shape
from shadowllm.plugins.quantisation import Quantisation
from shadowllm.predictor.weight_copy import COPY, copied

# Groups start on a page, so that runtimes can map them instead of reading them.
PAGE = 4096
Group = list[tuple[str, tuple[int, ...], ir.DataType]]
TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.UINT8: torch.uint8,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


class WeightStore:
    """Plans the layout of the data file, hands out initializers, and writes the file as a stream.

    Args:
        path: the data file.
        groups: runs of (name, shape, dtype) that lie back to back.
    """

    def __init__(self, path: Path, groups: Iterator[Group]) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        end = 0
        for group in groups:
            end = -(-end // PAGE) * PAGE
            for name, shape, dtype in group:
                length = math.prod(shape) * dtype.itemsize
                self.entries[name] = Entry(end, int(length), dtype, shape)
                end += int(length)
        self.size = end

    def tensor(self, name: str, *rest: str, inner: tuple[int, ...] | None = None) -> ir.ExternalTensor:
        """An initializer of one tensor, or of a run of tensors stacked along their rows.

        Args:
            inner: dimensions to give a row instead of its own.
        """
        entries = [self.entries[n] for n in (name, *rest)]
        for before, after in pairwise(entries):
            if before.offset + before.length != after.offset or before.shape[1:] != after.shape[1:]:
                raise ValueError(f"{name} and {rest} do not lie back to back")
        shape = (sum(e.shape[0] for e in entries), *(inner or entries[0].shape[1:]))
        return ir.ExternalTensor(
            self.path.name,
            entries[0].offset,
            sum(e.length for e in entries),
            entries[0].dtype,
            shape=ir.Shape(shape),
            name="+".join((name, *rest)),
            base_dir=self.path.parent,
        )

    def write(self, tensors: Mapping[str, torch.Tensor], progress: Callable[[int], None] = lambda _: None) -> str:
        """Write every planned tensor in turn, one in memory at a time; return the file's SHA-256.

        Raises:
            UserError: a number that its type in the file cannot hold.
        """
        digest = hashlib.sha256()
        with self.path.open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            for name, entry in self.entries.items():
                put(bytes(entry.offset - file.tell()))
                for block in _blocks(name, tensors[name], TORCH_DTYPES[entry.dtype]):
                    put(block)
                progress(entry.length)
        return digest.hexdigest()


def _blocks(name: str, tensor: torch.Tensor, dtype: torch.dtype, elements: int = 1 << 22) -> Iterator[memoryview]:
    """The bytes of a tensor in ``dtype``, converted a few million elements at a time."""
    rows = max(1, elements // max(1, math.prod(tensor.shape[1:])))
    for part in tensor.split(rows):
        converted = part.to(dtype).contiguous()
        # One cheap pass: NaN and infinity show in the extremes.
        if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
            raise _unfit(name, part, dtype)
        yield memoryview(converted.view(torch.uint8).reshape(-1).numpy())


def _unfit(name: str, part: torch.Tensor, dtype: torch.dtype) -> UserError:
    if not part.isfinite().all():
        return UserError(f"tensor {name} holds NaN or infinity", "the checkpoint or the predictor is damaged")
    kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return UserError(
        f"tensor {name} holds the number {float(part.abs().max()):g}, and {kind} ends at {largest:g}",
        "export with --dtype bf16 or fp32",
    )


def model_groups(spec: ModelSpec, dtype: ir.DataType, q: Quantisation | None = None) -> Iterator[Group]:
    """Layout of a model's canonical tensors, layer by layer, in the order a decode step reads them.

    With a quantisation, matrices are integers and scales (see `quantised`), and those that lie by
    input channel do so twice: ``MatMulNBits`` reads along the inputs, a sparse op along a neuron.
    """

    def floats(*names: str) -> Group:
        return [(name, tensor_shape(spec, name), dtype) for name in names]

    def matrices(*names: str) -> Iterator[Group]:
        if q is None:
            yield floats(*names)
        else:
            yield from quantised_groups({name: tensor_shape(spec, name) for name in names}, q)

    def norm(place: str) -> list[str]:
        return [f"{place}.weight"] + ([f"{place}.bias"] if spec.norm == "layernorm" else [])

    yield from matrices("embed_tokens.weight")
    if spec.positions == "learned":
        yield floats("embed_positions.weight")
    mlp = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    for i in range(spec.n_layers):
        place = f"layers.{i}"
        yield floats(*norm(f"{place}.input_norm"), *norm(f"{place}.post_norm"))
        for parts, biased in (
            (("q_proj", "k_proj", "v_proj"), spec.qkv_bias),
            (("o_proj",), spec.o_bias),
            (mlp, spec.mlp_bias),
            (("down_proj",), spec.mlp_bias),
        ):
            yield from matrices(*(f"{place}.{part}.weight" for part in parts))
            if biased:
                yield floats(*(f"{place}.{part}.bias" for part in parts))
        if q is not None:
            for part in ("o_proj", "down_proj"):
                name = f"{place}.{part}.weight"
                yield from quantised_groups({f"{name}.T": tensor_shape(spec, name)[::-1]}, q)
    yield floats(*norm("final_norm"))
    if not spec.tied_embeddings:
        yield from matrices("lm_head.weight")


def copy_groups(spec: ModelSpec, dense_layers: int) -> Iterator[Group]:
    """Layout of a quantised shadow: the copy of gate and up, and ``||w_down||``, of each sparse layer."""
    for layer in range(dense_layers, spec.n_layers):
        yield from quantised_groups({f"copy.{name}": tensor_shape(spec, name) for name in copied(spec, layer)}, COPY)
        yield [(f"copy.layers.{layer}.lengths", (spec.intermediate_size,), ir.DataType.FLOAT)]


def quantised_groups(shapes: Mapping[str, tuple[int, ...]], q: Quantisation) -> Iterator[Group]:
    """Layout of the integers, and then of the scales, of matrices ``(rows, width)`` that are read together."""
    yield [(f"{name}.q", (rows, q.bytes(width)), ir.DataType.UINT8) for name, (rows, width) in shapes.items()]
    yield [(f"{name}.scales", (rows, q.blocks(width)), ir.DataType.FLOAT) for name, (rows, width) in shapes.items()]
