"""The pass that rounds products with float matrices to 8 bits, and the steps that run such graphs."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS
from shadowllm.bundle.quantisation import ROUNDED, rounded
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort import loaded_bundle
from shadowllm.runtime.ort.loaded_bundle import DENSE, LoadedBundle, Plan
from shadowllm.runtime.ort.round_products import RoundProducts
from shadowllm.runtime.ort.session import OrtSession
from tests.runtime.ort.test_join_nested import WEIGHTS, in_file, outputs

NEEDS_NATIVE = pytest.mark.skipif(not native_ops.kernels(), reason="the native ops are not built")
ROWS = 7
PROMPT, TOKENS = [5, 17, 42, 8, 61], [3, 90, 14, 55]


def model(width, rows_out, bias, name="layers.1.k_proj.weight", dtype=ir.DataType.FLOAT):
    """A product as the exporter writes it; its matrix, with a row for each output; its bias."""
    generator = np.random.default_rng(width)
    matrix = generator.standard_normal((ROWS, width)).astype(dtype.numpy())
    shift = generator.standard_normal(ROWS).astype(np.float32)
    stored = ir.tensor(matrix if rows_out else np.ascontiguousarray(matrix.T), name=name)
    x, y = (ir.val(each, dtype=ir.DataType.FLOAT, shape=["n", size]) for each, size in (("x", width), ("y", ROWS)))
    weights = [ir.val(name, const_value=stored, dtype=dtype, shape=stored.shape)]
    if bias:
        weights.append(ir.val("bias", const_value=ir.tensor(shift, name="bias")))
    node = ir.node("Gemm", [x, *weights], {"transB": int(rows_out)}, outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports={"": 24})
    return ir.Model(graph, ir_version=11), matrix.astype(np.float32), shift * bias


@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("rows_out", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_NATIVE), False])
def test_a_product_is_that_of_the_rounded_matrix(width, rows_out, bias, native, tmp_path):
    built, matrix, shift = model(width, rows_out, bias)
    built, rounding = in_file(built, tmp_path), RoundProducts(native)
    x = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    exact = outputs(built, tmp_path, x)
    assert rounding(built).modified
    (product,) = built.graph
    assert product.op_type == ("NestedLinear" if native else "MatMulNBits")
    exactly = ir.AttrInt64("exact_copies", 1) if native else ir.AttrInt64("accuracy_level", 1)
    product.attributes[exactly.name] = exactly
    found = outputs(built, tmp_path, x, rounding.weights)
    wanted = x @ rounded(matrix, ROUNDED).T + shift
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert 1e-5 < np.abs(found - exact).max() / np.abs(exact).max() < 0.02


def test_16_bit_matrices_are_rounded_too(tmp_path):
    built, matrix, _ = model(64, True, False, dtype=ir.DataType.BFLOAT16)
    built, rounding = in_file(built, tmp_path), RoundProducts(native=False)
    rounding(built)
    integers, scales = (compute() for compute in rounding.weights.values())
    values = (integers.astype(np.float32) - 128) * scales[..., None]
    np.testing.assert_allclose(values.reshape(ROWS, 64), rounded(matrix, ROUNDED), rtol=1e-6)


def test_networks_of_predictors_stay_floats(tmp_path):
    built = in_file(model(64, True, False, name="predictor.layers.1.net.weight")[0], tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    assert not RoundProducts(native=True)(built).modified


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("budget", "plan"),
    [
        (Budget(neurons=0.2), Plan("sparse", BODY_ALL_HEADS, rounded=True)),
        (Budget(neurons=(0.2, 1.0)), Plan("sparse", BODY_ALL_HEADS, rounded=True)),
        (Budget(neurons=0.2, heads=(1.0, 0.5)), Plan("sparse", BODY, rounded=True)),
        (Budget(heads=0.5), Plan("sparse", BODY, rounded=True)),
        (Budget(neurons=0.2, rest="drop"), Plan("sparse", BODY)),
        (Budget(), Plan("sparse", BODY, everything=True)),
        (Budget(shortlist=3), Plan("sparse", BODY, everything=True)),
    ],
)
def test_what_every_token_reads_is_rounded_unless_all_units_are_active(bundle, budget, plan):
    folder = bundle(kind="quantized-shadow", rest="shadow")
    assert LoadedBundle(folder, "sparse").plan(budget) == plan
    assert LoadedBundle(folder, "dense").plan(budget) == DENSE
    for options in ({"exact": True}, {"native": False}):
        found = LoadedBundle(folder, "sparse", **options).plan(budget)
        assert astuple(found) == (plan.decodes, plan.body, False, plan.everything)


@NEEDS_NATIVE
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-biases", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [1.0, 0.5])
def test_the_rounding_changes_little(bundle, variant, dtype, heads, monkeypatch):
    """And less than leaving the rest out. Dense steps of the same session stay exact."""
    folder = bundle(variant, dtype=dtype, kind="static", rest="shadow")

    def logits(budget, **options):
        with OrtSession(folder, "sparse", **options) as session:
            session.set_budget(budget)
            session.prefill([PROMPT])
            found = [session.decode(np.array([token]))[0].copy() for token in TOKENS]
            session.rewind(np.array([len(PROMPT)]))
            return np.array(found), session.verify(np.array([TOKENS]))[0].copy()

    budget = Budget(neurons=0.3, heads=heads)
    (mine, dense), (exact, wanted) = logits(budget), logits(budget, exact=True)
    dropped, _ = logits(Budget(neurons=0.3, heads=heads, rest="drop"))
    error = np.abs(mine - exact).max()
    assert 0 < error < 0.07 * np.abs(exact).max()
    assert error < 0.1 * np.abs(dropped - exact).max()
    np.testing.assert_allclose(dense, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    monkeypatch.setattr(loaded_bundle, "rounds_products", lambda _: False)
    assert (logits(budget)[0] != mine).any()  # the native ops round their inputs in both
