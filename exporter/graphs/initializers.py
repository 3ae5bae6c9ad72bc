"""Initializers of a graph that are stored in the bundle's data file."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from shadowllm.bundle.weight_file import WeightStore

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
}


def initializer(store: WeightStore, name: str, *rest: str, inner: tuple[int, ...] | None = None) -> ir.ExternalTensor:
    """One tensor of the data file, or several consecutive tensors stacked along their rows.

    Args:
        inner: shape of a row, if it differs from the stored one.
    """
    entries = [store.entries[n] for n in (name, *rest)]
    for before, after in pairwise(entries):
        if before.offset + before.length != after.offset or before.shape[1:] != after.shape[1:]:
            raise ValueError(f"{name} and {rest} do not lie back to back")
    shape = (sum(e.shape[0] for e in entries), *(inner or entries[0].shape[1:]))
    return ir.ExternalTensor(
        store.path.name,
        entries[0].offset,
        sum(e.length for e in entries),
        DTYPES[entries[0].dtype],
        shape=ir.Shape(shape),
        name="+".join((name, *rest)),
        base_dir=store.path.parent,
    )
