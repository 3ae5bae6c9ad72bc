"""The pass that rounds the rows of our ops to residuals of their low-bit copy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.bundle.quantisation import ROUNDED, dequantise, dequantise_nested
from shadowllm.plugins import native_ops
from shadowllm.plugins.ops.sparse_attention.schema import PARTS as ATTENTION_PARTS
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from shadowllm.plugins.ops.sparse_mlp.schema import PARTS as MLP_PARTS
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.runtime.ort.graph import for_cpu
from shadowllm.runtime.ort.loaded_bundle import LoadedBundle
from shadowllm.runtime.ort.round_rows import RoundRows

NEEDS_NATIVE = pytest.mark.skipif(not native_ops.kernels(), reason="the native ops are not built")


def rows(model):
    """The names of the initializers of each of our ops' matrices: full rows, copy, scales of the copy."""
    for node in (each for each in model.graph if each.domain == DOMAIN):
        schema, parts = {
            SPARSE_MLP.name: (SPARSE_MLP, MLP_PARTS),
            SPARSE_ATTENTION.name: (SPARSE_ATTENTION, ATTENTION_PARTS),
        }.get(node.op_type, (None, ()))
        for part in parts:
            names = [port.name for port in schema.inputs]
            places = [names.index(f"{kind}_{part}") for kind in ("w", "c", "cs")]
            values = [node.inputs[place] if place < len(node.inputs) else None for place in places]
            if values[0] is not None:
                yield [None if value is None else value.name for value in values]


@pytest.mark.parametrize("variant", ["llama-gqa", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residuals_complete_the_copy_to_8_bits(bundle, variant, dtype):
    model = ir.load(bundle(variant, dtype=dtype, kind="quantized-shadow", rest="shadow") / "body.onnx")
    stored = {
        name: np.array(value.const_value.numpy(), dtype=None if value.dtype == ir.DataType.UINT8 else np.float32)
        for name, value in model.graph.initializers.items()
    }
    before, rounding = list(rows(model)), RoundRows()
    assert rounding(model).modified
    after = list(rows(model))
    assert {name for name, *_ in after} == set(rounding.weights)
    for (whole, copy, scales), (residual, *others) in zip(before, after, strict=True):
        assert others == [copy, scales]
        exact, integers, width = stored[whole], stored[copy].reshape(len(stored[copy]), -1), stored[whole].shape[1]
        assert model.graph.initializers[residual].dtype == ir.DataType.UINT8
        low = dequantise(integers, stored[scales], width, ROUNDED.copy)
        found = dequantise_nested(integers, stored[scales], rounding.weights[residual](), width, ROUNDED)
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.12 * np.sqrt(np.mean((low - exact) ** 2))


def test_rows_without_a_copy_stay(bundle):
    model = ir.load(bundle(kind="quantized-shadow", rest="drop") / "body.onnx")
    before = list(rows(model))
    assert before
    assert not RoundRows()(model).modified
    assert list(rows(model)) == before


@NEEDS_NATIVE
@pytest.mark.parametrize("rounded", [True, False])
def test_only_rounded_graphs_read_residuals(bundle, rounded):
    folder = bundle(kind="quantized-shadow", rest="shadow")
    manifest = LoadedBundle(folder).manifest
    graph = for_cpu([ir.load(folder / "body.onnx")], manifest, native=True, rounded=rounded)
    residuals = [name for name in graph.computed if name.endswith(".rounded.residual")]
    assert len(residuals) == (5 * manifest.sparse_layers.count if rounded else 0)
