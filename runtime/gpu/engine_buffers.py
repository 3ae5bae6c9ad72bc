"""What lies where on the device: the buffers of an engine session, and which tensor of which piece is bound to which.

Everything here is arithmetic on sizes and names, so that it is the same, and tested, without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shadowllm.bundle import selection_names as names
from shadowllm.bundle.engine_record import EngineRecord
from shadowllm.errors import UserError
from shadowllm.models.sparsity import UNITS, SparseLayers, layer_units
from shadowllm.runtime.session import Memory

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")  # also the order of an engine's profiles
ALIGNMENT = 256  # of every address that TensorRT is given
ITEMSIZE = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2}
# Tensors whose buffer depends on the phase. A prefill is dense: everything is selected, the predictor not asked.
OWN = {
    "prefill": {
        "input_ids": "prompt_ids",
        "position_ids": "prompt_positions",
        "logits_to_keep": "last_tokens",
        **{name: f"all_{name}" for name in names.SELECTION},
    },
    "decode": {"input_ids": "tokens", "position_ids": "positions", "logits_to_keep": "first_token"},
}


@dataclass(frozen=True)
class Limits:
    """What engines were built for: most sequences, longest prompt, positions of the cache."""

    batch: int
    seqlen: int
    capacity: int

    @classmethod
    def of(cls, records: Sequence[EngineRecord]) -> Limits:
        """Read off the profiles of the engines of one step, the first of which takes the tokens.

        Raises:
            UserError: the engines were built for different sizes.
        """
        profiles = {profile.name: profile.shapes for profile in records[0].profiles}
        batch, seqlen = profiles["prefill"]["input_ids"][2]
        found = cls(batch, seqlen, profiles["prefill"]["past_key_values.0.key"][2][2])
        for record in records[1:]:
            shapes = record.profiles[0].shapes
            if "hidden" in shapes and shapes["hidden"][2][:2] != (batch, seqlen):
                raise UserError(
                    "the engines of this bundle were built for different shapes", "build them again: `shadowllm build`"
                )
        return found


@dataclass(frozen=True)
class Buffer:
    """A piece of device memory; ``shape`` is the largest it is used with."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def buffers(layers: SparseLayers, dtype: str, batch: int, limits: Limits) -> dict[str, Buffer]:
    """Every buffer of a session by name, for ``batch`` sequences.

    Args:
        layers: with a selection; none for a dense session.
        dtype: of activations and cache.
    """
    spec = layers.spec
    prompt, one = (batch, limits.seqlen), (batch, 1)
    cache = (batch, spec.n_kv_heads, limits.capacity, spec.head_dim)
    found = [
        *(Buffer(name, "int64", prompt) for name in ("prompt_ids", "prompt_positions")),
        *(Buffer(name, "int64", one) for name in ("last_tokens", "first_token", "tokens", "positions")),
        *(Buffer(name, "int64", one) for name in ("next_tokens", "next_position_ids")),
        Buffer("logits", "float32", (*one, spec.vocab_size)),
        *(Buffer(f"cache.{layer}.{part}", dtype, cache) for layer in range(spec.n_layers) for part in ("key", "value")),
    ]
    if layers.count:
        found.append(Buffer("hidden", dtype, (*prompt, spec.hidden_size)))
        for unit, width in layer_units(spec).items():
            indices, counts = names.indices(unit), names.counts(unit)
            for prefix in ("all_", ""):
                found.append(Buffer(f"{prefix}{indices}", "int32", (layers.count, width)))
                found.append(Buffer(f"{prefix}{counts}", "int32", (layers.count,)))
            for row in range(layers.count):  # what layers that choose by themselves say they chose
                found.append(Buffer(names.of_row(indices, row), "int32", (width,)))
    return {buffer.name: buffer for buffer in found}


def buffer_of(tensor: str, phase: Phase) -> str:
    """The buffer that a piece's tensor is bound to.

    A cache has one for what goes in and what comes out, so that it is updated where it lies; what one piece
    writes and the next one reads has one too.
    """
    for prefix in ("past_key_values.", "present."):
        if tensor.startswith(prefix):
            return f"cache.{tensor.removeprefix(prefix)}"
    return OWN[phase].get(tensor, tensor)


def shape_of(buffer: Buffer, seqlen: int) -> tuple[int, ...]:
    """Shape of a tensor of a step over ``seqlen`` tokens, by its buffer's."""
    if buffer.name in ("prompt_ids", "prompt_positions", "hidden"):
        return (buffer.shape[0], seqlen, *buffer.shape[2:])
    return buffer.shape


def layout(found: Mapping[str, Buffer]) -> tuple[dict[str, int], int]:
    """Offset of every buffer in one arena, and the arena's size in bytes."""
    offsets, end = {}, 0
    for name, buffer in found.items():
        offsets[name] = end
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def constants(found: Mapping[str, Buffer]) -> dict[str, np.ndarray]:
    """Contents of the buffers that never change: the selection of everything. Others start at zero."""
    contents = {}
    for unit in UNITS:
        indices, counts = (f"all_{name(unit)}" for name in (names.indices, names.counts))
        if indices in found:
            rows, width = found[indices].shape
            contents[indices] = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
            contents[counts] = np.full(rows, width, dtype=np.int32)
    return contents


def memory_of(records: Sequence[EngineRecord], found: Mapping[str, Buffer], workspace: int) -> Memory:
    """What engines and buffers take on the device, from sizes alone."""
    cache = sum(buffer.nbytes for buffer in found.values() if buffer.name.startswith("cache."))
    rest = sum(buffer.nbytes for buffer in found.values()) - cache
    return Memory(sum(record.engine_bytes for record in records), cache, rest, workspace)
