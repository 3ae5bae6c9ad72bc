"""The device buffers of a TensorRT session, their layout, and the buffer of each engine tensor.

This module only computes sizes and names, so it can be tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shadowllm.bundle import selection_names as names
from shadowllm.bundle.engine_record import EngineRecord
from shadowllm.errors import UserError
from shadowllm.models.sparsity import UNITS, SparseLayers, layer_units
from shadowllm.runtime.session import Memory

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")  # also the order of an engine's profiles
SHORTEST_PROMPT = 16  # shorter prompts are padded to this length
ALIGNMENT = 256  # of every address that TensorRT is given
ITEMSIZE = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2}
# Tensors whose buffer depends on the phase. A prefill is dense: all units are selected, all rows of the output table
# are exact, and no predictor runs.
OWN = {
    "prefill": {
        "input_ids": "prompt_ids",
        "position_ids": "prompt_positions",
        "logits_to_keep": "kept_tokens",
        **{name: f"all_{name}" for name in (*names.SELECTION, names.SHORTLIST)},
    },
    "decode": {"input_ids": "tokens", "position_ids": "positions", "logits_to_keep": "first_token"},
}


@dataclass(frozen=True)
class Limits:
    """The sizes that engines are built for.

    Attributes:
        batch: most sequences.
        seqlen: longest prompt.
        capacity: positions of the cache.
        kept: most tokens of a sequence whose logits a dense step returns. 1 serves prompts alone.
    """

    batch: int
    seqlen: int
    capacity: int
    kept: int = 1

    def rebuilt(self, **sizes: int) -> str:
        """A remedy: the command that builds engines with other sizes."""
        new = replace(self, **sizes)
        return (
            "build them again: `shadowllm build OUT --engine ENGINE "
            f"--max-batch {new.batch} --max-seqlen {new.seqlen} --capacity {new.capacity} --max-draft {new.kept - 1}`"
        )

    def prompt_length(self, longest: int) -> int:
        """The length to which prompts are padded: the next power of two, because TensorRT-RTX compiles for each length.

        Raises:
            UserError: the longest prompt is longer than the engines take.
        """
        if longest > self.seqlen:
            raise UserError(
                f"a prompt of {longest} tokens, the engines take {self.seqlen}", self.rebuilt(seqlen=longest)
            )
        return min(self.seqlen, max(SHORTEST_PROMPT, 1 << (longest - 1).bit_length()))

    @classmethod
    def of(cls, records: Sequence[EngineRecord]) -> Limits:
        """Read the limits from the profiles of one step's engines; the first engine takes the tokens.

        Raises:
            UserError: the engines were built for different sizes.
        """
        profiles = {profile.name: profile.shapes for profile in records[0].profiles}
        batch, seqlen = profiles["prefill"]["input_ids"][2]
        kept = [
            record.profiles[0].shapes["logits_to_keep"][2][1]
            for record in records
            if "logits_to_keep" in record.profiles[0].shapes
        ]
        found = cls(batch, seqlen, profiles["prefill"]["past_key_values.0.key"][2][2], *kept)
        for record in records[1:]:
            shapes = record.profiles[0].shapes
            if "hidden" in shapes and shapes["hidden"][2][:2] != (batch, seqlen):
                raise UserError("the engines of this bundle were built for different shapes", found.rebuilt())
        return found


@dataclass(frozen=True)
class Buffer:
    """A part of device memory; ``shape`` is the largest shape of its tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def buffers(layers: SparseLayers, dtype: str, batch: int, limits: Limits) -> dict[str, Buffer]:
    """All buffers of a session by name, for ``batch`` sequences.

    Args:
        layers: the sparse layers; their count is 0 for a dense session.
        dtype: type of activations and cache.
    """
    spec = layers.spec
    prompt, kept, one = (batch, limits.seqlen), (batch, limits.kept), (batch, 1)
    cache = (batch, spec.n_kv_heads, limits.capacity, spec.head_dim)
    found = [
        *(Buffer(name, "int64", prompt) for name in ("prompt_ids", "prompt_positions")),
        *(Buffer(name, "int64", kept) for name in ("kept_tokens", "next_tokens")),
        *(Buffer(name, "int64", one) for name in ("first_token", "tokens", "positions", "next_position_ids")),
        Buffer("logits", "float32", (*kept, spec.vocab_size)),
        *(Buffer(f"cache.{layer}.{part}", dtype, cache) for layer in range(spec.n_layers) for part in ("key", "value")),
    ]
    if layers.count:
        found.append(Buffer("hidden", dtype, (*prompt, spec.hidden_size)))
        # Of bundles with a low-bit copy of all matrices.
        found += (Buffer(name, "int32", ()) for name in (*names.SCALARS, f"all_{names.SHORTLIST}"))
        found.append(Buffer(names.RECOMPUTED, "int32", (batch * limits.kept,)))
        for unit, width in layer_units(spec).items():
            indices, counts = names.indices(unit), names.counts(unit)
            for prefix in ("all_", ""):
                found.append(Buffer(f"{prefix}{indices}", "int32", (layers.count, width)))
                found.append(Buffer(f"{prefix}{counts}", "int32", (layers.count,)))
            for row in range(layers.count):  # outputs of the layers with a per-layer predictor
                found.append(Buffer(names.of_row(indices, row), "int32", (width,)))
    return {buffer.name: buffer for buffer in found}


def buffer_of(tensor: str, phase: Phase) -> str:
    """The name of the buffer that an engine's tensor is bound to.

    A cache's input and output share one buffer, so that the cache is updated in place. A tensor that one engine writes
    and the next one reads is also one buffer.
    """
    for prefix in ("past_key_values.", "present."):
        if tensor.startswith(prefix):
            return f"cache.{tensor.removeprefix(prefix)}"
    return OWN[phase].get(tensor, tensor)


def shape_of(buffer: Buffer, seqlen: int, kept: int = 1) -> tuple[int, ...]:
    """Shape of an input in a step over ``seqlen`` tokens per sequence, which returns the logits after ``kept``."""
    if buffer.name in ("prompt_ids", "prompt_positions", "hidden"):
        return (buffer.shape[0], seqlen, *buffer.shape[2:])
    return (buffer.shape[0], kept) if buffer.name == "kept_tokens" else buffer.shape


def layout(found: Mapping[str, Buffer]) -> tuple[dict[str, int], int]:
    """Offset of each buffer in one allocation, and the size of the allocation in bytes."""
    offsets, end = {}, 0
    for name, buffer in found.items():
        offsets[name] = end
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def constants(found: Mapping[str, Buffer]) -> dict[str, np.ndarray]:
    """Contents of the buffers that never change, which select everything; other buffers start at zero."""
    contents = {}
    if f"all_{names.SHORTLIST}" in found:
        contents[f"all_{names.SHORTLIST}"] = np.array(found["logits"].shape[-1], dtype=np.int32)
    for unit in UNITS:
        indices, counts = (f"all_{name(unit)}" for name in (names.indices, names.counts))
        if indices in found:
            rows, width = found[indices].shape
            contents[indices] = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
            contents[counts] = np.full(rows, width, dtype=np.int32)
    return contents


def memory_of(records: Sequence[EngineRecord], found: Mapping[str, Buffer], workspace: int) -> Memory:
    """Device memory of engines and buffers, computed from their sizes."""
    cache = sum(buffer.nbytes for buffer in found.values() if buffer.name.startswith("cache."))
    rest = sum(buffer.nbytes for buffer in found.values()) - cache
    return Memory(sum(record.engine_bytes for record in records), cache, rest, workspace)
