"""Dense steps of nested integers with the native ops."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.limits import LONGEST_DRAFT
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.plugins.registry import NATIVE_SCHEMAS, SCHEMAS
from shadowllm.runtime.ort import kv_cache
from shadowllm.runtime.ort.graph import for_cpu
from shadowllm.runtime.ort.loaded_bundle import DENSE, LoadedBundle
from shadowllm.runtime.ort.session import OrtSession
from tests.conftest import FAMILIES, VARIANTS
from tests.plugins.native_model import built

pytestmark = built
NESTED = {"kind": "quantized-shadow", "rest": "shadow", "weight_dtype": "int8"}
PROMPTS = [[5, 17, 42, 3], [8, 1, 30, 11]]
MODELS = (*VARIANTS, *FAMILIES)


@pytest.fixture(autouse=True)
def native_linear(monkeypatch):
    """On every CPU, also where it does not pay."""
    monkeypatch.setattr(native_ops, "linear_pays", lambda: True)


def node_types(folder, native):
    graph = for_cpu([ir.load(folder / "dense.onnx")], read_manifest(folder), native)
    return {node.op_type for node in onnx.ModelProto.FromString(graph.model).graph.node}


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("weight_dtype", ["int8", "int6"])
def test_a_token_has_the_same_logits_in_any_step(bundle, variant, weight_dtype, monkeypatch):
    """So lossless text does not depend on the lengths of drafts."""
    monkeypatch.setattr(kv_cache, "CACHE_BLOCK", 8)  # the cache grows in the middle of a text
    tokens = np.random.default_rng(3).integers(3, 90, (len(PROMPTS), 18))
    with OrtSession(bundle(variant, **NESTED | {"weight_dtype": weight_dtype}), threads=2) as session:
        session.set_budget(Budget())
        assert session.decodes == "dense"
        session.reset(len(PROMPTS))
        session.prefill(PROMPTS)
        lengths = np.array([len(prompt) for prompt in PROMPTS])
        alone = np.stack([session.decode(column).copy() for column in tokens.T], axis=1)
        for size in (1, 2, 3, 6, 9):
            session.rewind(lengths)
            found = [session.verify(tokens[:, i : i + size]).copy() for i in range(0, tokens.shape[1], size)]
            np.testing.assert_array_equal(np.concatenate(found, axis=1), alone)
        session.reset()
        session.prefill(PROMPTS[:1])
        single = np.stack([session.decode(token).copy() for token in tokens[:1].T], axis=1)
        np.testing.assert_array_equal(single, alone[:1])


def test_the_longest_draft(bundle):
    tokens = np.random.default_rng(3).integers(3, 90, (1, LONGEST_DRAFT + 1))
    with OrtSession(bundle("opt-350m", **NESTED), threads=2) as session:
        session.set_budget(Budget())
        session.prefill([[5]])
        tokens = tokens[:, : session.spec.max_seqlen - 1]
        alone = np.stack([session.decode(column).copy() for column in tokens.T], axis=1)
        session.rewind(np.array([1]))
        np.testing.assert_array_equal(session.verify(tokens), alone)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-biases", "opt", "gemma3", "phi3"])
def test_logits_are_about_those_of_the_runtimes_own_ops(bundle, variant):
    folder, found = bundle(variant, **NESTED), {}
    for kind in ("auto", "dense"):
        with OrtSession(folder, kind, threads=2) as session:
            session.set_budget(Budget())
            session.reset(len(PROMPTS))
            logits = [session.prefill(PROMPTS).copy()]
            found[kind] = np.stack(logits + [session.decode(np.array([t, t + 1])).copy() for t in (3, 90, 14)])
    assert np.abs(found["auto"] - found["dense"]).max() < 0.05 * np.abs(found["dense"]).max()


@pytest.mark.parametrize(
    ("variant", "layer"), [("llama-gqa", "DenseDecoderLayer"), ("opt", "DenseMLP"), ("gemma3", "DenseMLP")]
)
def test_all_products_are_native(bundle, variant, layer):
    folder = bundle(variant, **NESTED)
    types = node_types(folder, native=True)
    assert layer in types
    assert types.isdisjoint({"MatMulNBits", "MatMul", "Gemm", "GroupQueryAttention", "Attention"})
    assert node_types(folder, native=False).isdisjoint(SCHEMAS | NATIVE_SCHEMAS)


@pytest.mark.parametrize(
    ("options", "native"),
    [
        ({}, True),
        ({"kind": "dense"}, False),  # the baseline of benchmarks
        ({"exact": True}, False),  # for validation
        ({"native": False}, False),
        ({"prefill": "sparse"}, False),  # has no dense graph
    ],
    ids=str,
)
def test_which_sessions_have_it(bundle, options, native):
    assert LoadedBundle(bundle(**NESTED), **options).native_dense == native


def test_plain_integers_and_floats_have_their_own_dense_steps(bundle, monkeypatch):
    for options in ({"kind": "static", "weight_dtype": "int8"}, {"kind": "quantized-shadow", "rest": "shadow"}):
        assert not LoadedBundle(bundle("llama-blocks", **options)).native_dense
    monkeypatch.setattr(native_ops, "linear_pays", lambda: False)
    assert not LoadedBundle(bundle(**NESTED)).native_dense


def test_a_library_that_does_not_load_leaves_the_runtimes_own_ops(bundle, monkeypatch, tmp_path):
    damaged, prompt = tmp_path / "damaged.so", [PROMPTS[0]]
    damaged.write_text("no library")
    with OrtSession(bundle(**NESTED), native=False) as session:
        wanted = session.prefill(prompt).copy()
    monkeypatch.setenv(native_ops.PATH_VARIABLE, str(damaged))
    with pytest.warns(RuntimeWarning, match=r"damaged\.so do not load"):
        session = OrtSession(bundle(**NESTED))
    with session:
        np.testing.assert_array_equal(session.prefill(prompt), wanted)
        session.verify(np.array([[3, 4]]))


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(("weight_dtype", "rest"), [("int8", "shadow"), ("int6", "shadow"), ("int4", "drop")])
def test_which_steps_run_sequences_together(bundle, weight_dtype, rest, pays, monkeypatch):
    """Those with the same bits alone, also if ONNX Runtime multiplies the joined integers."""
    monkeypatch.setattr(native_ops, "linear_pays", lambda: pays)
    folder, found = bundle("llama-blocks", kind="static", rest=rest, weight_dtype=weight_dtype), []
    loaded = LoadedBundle(folder)
    loaded.load(DENSE)
    assert loaded.independent(DENSE) == (weight_dtype != "int4")
    loaded.close()
    if weight_dtype == "int4":
        return
    for prompts in (PROMPTS, PROMPTS[:1]):
        with OrtSession(folder, threads=2) as session:
            session.set_budget(Budget())
            session.reset(len(prompts))
            session.prefill(prompts)
            found.append(session.decode(np.arange(3, 3 + len(prompts)))[:1].copy())
    np.testing.assert_array_equal(*found)
