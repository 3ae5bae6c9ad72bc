"""Canonical weights: the same names and layout for every family, read tensor by tensor.

In every projection, a neuron is one row and a head is a run of rows. ``q/k/v/gate/up_proj`` are
``(out, hidden_size)`` as in Hugging Face. ``o_proj`` and ``down_proj`` are transposed to
``(in, hidden_size)``. An active head or neuron is therefore a contiguous block in all of its
matrices, and the sparse ops read only active rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional as F

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec

CONVERTED_AT_ONCE = 1 << 23  # elements of a table


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, and how it becomes a canonical one.

    Attributes:
        name: its name in the checkpoint.
        transpose: whether it is stored transposed.
        part: first row of the canonical tensor and number of all rows, if the stored tensor is several in one.
        order: the stored row, within a head, of each row of a head (see `rope.rotated_first`); None keeps the order.
        scale, shift: the canonical tensor is ``scale * (stored + shift)``, computed in float32.
        factor: another tensor; the canonical one is the product ``stored @ factor``, computed in float32. With
            ``factor_transposed``, it is ``stored @ factor.T``.
    """

    name: str
    transpose: bool = False
    part: tuple[int, int] | None = None
    order: Sequence[int] | None = None
    scale: float = 1.0
    shift: float = 0.0
    factor: str | None = None
    factor_transposed: bool = False

    @property
    def names(self) -> list[str]:
        """All tensors of the checkpoint that are read."""
        return [self.name] + ([self.factor] if self.factor else [])

    def convert(self, stored: torch.Tensor) -> torch.Tensor:
        """Apply ``order``, ``scale``, ``shift`` and ``transpose`` to the rows of the stored tensor."""
        if self.order is not None:
            stored = stored.unflatten(0, (-1, len(self.order)))[:, list(self.order)].flatten(0, 1)
        if (self.scale, self.shift) != (1.0, 0.0):
            # In place, because the tensor may be the largest of the model; in a copy, because others may read it.
            stored = stored.to(torch.float32, copy=True).add_(self.shift).mul_(self.scale)
        return stored.t() if self.transpose else stored


class TensorFile(Protocol):
    """A checkpoint's tensors by their Hugging Face names (without the ``model.`` prefix)."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Element type of each stored tensor, as safetensors names it; float tensors may be missing."""
        ...

    def names(self) -> set[str]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def fingerprint(self) -> str: ...


class Weights(Mapping[str, torch.Tensor]):
    """Mapping of canonical names to tensors. Each access reads the tensor from the checkpoint again.

    Args:
        activation: of the MLP, if it is not the one that the checkpoint states: its name and threshold.

    Raises:
        UserError: at construction if a tensor is missing; at access if its shape is wrong or it holds NaN or infinity.
    """

    def __init__(
        self, spec: ModelSpec, tensors: TensorFile, sources: Mapping[str, Source], activation: Sequence[object] = ()
    ) -> None:
        _check_complete({name for source in sources.values() for name in source.names}, tensors.names())
        self.spec = spec
        self._tensors = tensors
        self._sources, self._activation = dict(sources), tuple(activation)
        self._fingerprint: str | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self._sources[name]
        tensor = self._read(source)
        expected = self.shape(name)
        expected = expected[::-1] if source.transpose else expected
        first, total = source.part or (0, expected[0])
        stored = (total, *expected[1:])
        if tuple(tensor.shape) != stored:
            raise UserError(
                f"tensor {source.name} has shape {tuple(tensor.shape)}, the config says {stored}",
                "the checkpoint and its config.json do not belong together",
            )
        _check_finite(source.name, tensor)
        return source.convert(tensor[first : first + expected[0]])

    def _read(self, source: Source) -> torch.Tensor:
        tensor = self._tensors.read(source.name)
        if source.factor is None:
            return tensor
        factor = self._tensors.read(source.factor).float()
        factor = factor.t() if source.factor_transposed else factor
        if tensor.ndim != 2 or factor.ndim != 2 or tensor.shape[1] != factor.shape[0]:
            raise UserError(
                f"tensors {source.name} and {source.factor} have shapes that cannot be multiplied",
                "the checkpoint and its config.json do not belong together",
            )
        return tensor.float() @ factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a canonical tensor according to the spec."""
        return tensor_shape(self.spec, name)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the checkpoint's weight files, computed once. A predictor is bound to it.

        With another activation than the checkpoint's, it is that of this number and the activation.
        """
        if self._fingerprint is None:
            files = self._tensors.fingerprint()
            other = repr((files, *self._activation)).encode()
            self._fingerprint = hashlib.sha256(other).hexdigest() if self._activation else files
        return self._fingerprint

    def load(self) -> Floats:
        """Return all tensors, read one at a time, and kept in the type that they are stored in.

        Those that are stored transposed are views, and many are pages of the mapped file.
        """
        return Floats({name: self[name] for name in self})


class Floats(Mapping[str, torch.Tensor]):
    """Float tensors of another mapping in float32, converted whenever they are read.

    Attributes:
        stored: the other mapping.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def table_rows(weights: Mapping[str, torch.Tensor], name: str, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a table ``(rows, width)``, ``(*indices.shape, width)``. Of `Floats`, only these are converted."""
    if isinstance(weights, Floats):
        return F.embedding(indices, weights.stored[name]).float()
    return F.embedding(indices, weights[name])


def table_product(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Products of ``x (..., width)`` with all rows of a table, ``(..., rows)``.

    A table may be a large part of the model. That of `Floats` is converted in parts, to need little memory.
    """
    table = weights.stored[name] if isinstance(weights, Floats) else weights[name]
    if table.dtype == x.dtype:
        return F.linear(x, table)
    rows = max(1, CONVERTED_AT_ONCE // table.shape[1])
    return torch.cat([F.linear(x, part.float()) for part in table.split(rows)], dim=-1)


def stacked(spec: ModelSpec, sources: Mapping[str, Source], names: Sequence[str], whole: str) -> dict[str, Source]:
    """Return the sources of canonical matrices that a checkpoint stores as one, on top of each other.

    Args:
        sources: their sources if each were stored alone.
        names: canonical names, in the stored order.
        whole: name of the stored matrix.
    """
    rows = [tensor_shape(spec, name)[0] for name in names]
    return {name: replace(sources[name], name=whole, part=(sum(rows[:i]), sum(rows))) for i, name in enumerate(names)}


def _check_complete(expected: set[str], present: set[str]) -> None:
    missing = sorted(expected - present)
    if not missing:
        return
    if len(missing) == len(expected):
        raise UserError(
            f"none of the tensors that the config asks for is in the checkpoint, but others, such as {min(present)}",
            "its config.json belongs to another model, or it is not a whole model that generates text",
        )
    if missing == ["lm_head.weight"]:
        raise UserError(
            "the checkpoint lacks the tensor lm_head.weight, its output projection: it is a base model or a classifier",
            "use a model that generates text, saved as a class for causal language models (LlamaForCausalLM)",
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    others = sorted(present - expected)
    instead = f", but holds others, such as {others[0]}" if others else ""
    raise UserError(
        f"the checkpoint lacks the tensor {missing[0]}{more}{instead}",
        "a file of it is missing, or its config.json belongs to another model",
    )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    # aminmax returns NaN if any element is NaN, and needs no second copy of the tensor.
    low, high = (float(bound) for bound in tensor.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        what = "NaN" if math.isnan(low) else "an infinite number"
        raise UserError(
            f"tensor {name} holds {what}", "the checkpoint is damaged or its training diverged: use another one"
        )


def tensor_shape(spec: ModelSpec, name: str) -> tuple[int, ...]:
    """Return the shape of a canonical tensor: ``(rows, hidden_size)`` for projections, ``(rows,)`` for biases."""
    d, heads, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    part, kind = name.split(".")[-2:]
    if part in ("q_norm", "k_norm"):
        return (spec.head_dim,)
    if part.endswith("norm"):
        return (d,)
    if kind == "bias" and part in ("o_proj", "down_proj"):
        return (d,)
    rows = {
        "embed_tokens": spec.vocab_size,
        "lm_head": spec.vocab_size,
        "embed_positions": spec.max_seqlen + spec.position_offset,
        "q_proj": heads,
        "k_proj": kv,
        "v_proj": kv,
        "o_proj": heads,
        "gate_proj": spec.intermediate_size,
        "up_proj": spec.intermediate_size,
        "down_proj": spec.intermediate_size,
    }[part]
    return (rows,) if kind == "bias" else (rows, d)
