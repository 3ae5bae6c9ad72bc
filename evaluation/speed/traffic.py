"""The bytes that a backend reads per decode step of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shadowllm.bundle.cost_model import Itemsizes, Traffic, fired_shares, mean_traffic, predictor_bytes
from shadowllm.bundle.manifest import ITEMSIZE, Manifest
from shadowllm.bundle.sparse_pays import mixes, selects, sparse_pays
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.loaded_bundle import rounds_products

CPU_BACKENDS = ("ort", "torch")


def traffic_of(
    manifest: Manifest,
    backend: str,
    budget: Budget,
    prompt_len: int,
    new_tokens: int,
    fired: Sequence[float] = (),
) -> Traffic:
    """Return the mean bytes per decode step of a backend.

    ONNX Runtime decodes dense if that reads less.

    Args:
        backend: one of `runtime.BACKENDS`; a ``-dense`` one reads the whole model.
        fired: measured share of neurons that fired in each sparse layer, with the selector relu; that of the
            calibration text if empty.
    """
    sizes, options = _itemsizes(manifest, backend), dict[str, Any]()
    rounds = backend == "ort" and rounds_products(manifest)
    narrow_rows = manifest.quantisation is None and sizes.rows < sizes.matrices
    if not backend.endswith("-dense") and (backend != "ort" or sparse_pays(manifest, budget, narrow_rows, rounds)):
        rest, active = budget.rest_with(manifest.rest == "shadow"), budget.counts(manifest.sparse_layers)
        predicts = backend != "ort" or selects(manifest, budget)
        options = {
            "active": active,
            "choosing": predictor_bytes(manifest, sizes.matrices, rest, active) if predicts else 0,
            "rest": rest,
            "shortlist": budget.shortlist,
            "fired": fired or fired_shares(manifest),
        }
        if rounds and mixes(manifest, budget):
            sizes = sizes.rounded()
    return mean_traffic(manifest.spec, sizes, prompt_len, new_tokens, **options)


def _itemsizes(manifest: Manifest, backend: str) -> Itemsizes:
    """Return the bytes of an element before rounding."""
    # The CPU backends widen the weights of 16-bit bundles to float32. Only the rows of native ops stay at 16 bits.
    floats = 4 if backend.startswith(CPU_BACKENDS) else ITEMSIZE[manifest.dtype]
    q = manifest.quantisation if backend.startswith("ort") else None
    if q:
        joined = q.residual_bits and (backend == "ort-dense" or not native_ops.linear_pays())
        matrices = q.joined_itemsize if joined else q.itemsize
        return Itemsizes.of(floats, matrices=matrices, rows=q.itemsize, beside_copy=q.itemsize_beside_copy)
    native = backend == "ort" and native_ops.library()
    return Itemsizes.of(floats, rows=ITEMSIZE[manifest.dtype] if native else None)
