"""Dense layers with the output table of the body: it is read in part, or its rows stay 16-bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.graph import for_cpu
from shadowllm.runtime.ort.loaded_bundle import LoadedBundle
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.ort.shorten_dense import shorten
from tests.conftest import FAMILIES, VARIANTS
from tests.plugins.native_model import built

pytestmark = built
PROMPTS = [[5, 17, 42, 3], [8, 1, 30, 11]]
TOKENS = (3, 90, 14)
NESTED = {"kind": "quantized-shadow", "rest": "shadow"}


@pytest.fixture(autouse=True)
def native_linear(monkeypatch):
    """On every CPU, also where it does not pay."""
    monkeypatch.setattr(native_ops, "linear_pays", lambda: True)


def decoded(session, budget):
    """Logits of each step, and the rows that were computed exactly."""
    session.set_budget(budget)
    session.reset(len(PROMPTS))
    session.prefill(PROMPTS)
    steps = []
    for token in TOKENS:
        logits = session.decode(np.array([token, token + 1])).copy()
        steps.append((logits, session.recomputed.copy() if session.decodes == "sparse" else np.zeros(2)))
    return map(np.stack, zip(*steps, strict=True))


@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
@pytest.mark.parametrize("weight_dtype", ["int8", "int6"])
def test_the_shortlist_has_the_logits_of_dense_steps(bundle, variant, weight_dtype):
    with OrtSession(bundle(variant, **NESTED, weight_dtype=weight_dtype), "sparse", threads=2) as session:
        session.set_budget(Budget())
        dense, counts = decoded(session, Budget())
        assert (counts == session.spec.vocab_size).all()
        short, counts = decoded(session, Budget(shortlist=4))
        assert session.graphs[0] == "dense"
        assert (counts == 4).all()
        largest = np.abs(dense).max()
        assert ((np.abs(short - dense) < 1e-5 * largest).sum(axis=-1) >= 4).all()
        assert 0 < np.abs(short - dense).max() < 0.2 * largest
        proved, counts = decoded(session, Budget(shortlist=2, certify=True))
        assert (counts >= 2).all()
        best = np.take_along_axis(dense, proved.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        assert (dense.max(axis=-1) - best < 0.02 * largest).all()  # dense steps round their inputs, certificates do not


@pytest.mark.parametrize("variant", ["llama-gqa", "opt-350m", "gemma3"])
def test_everything_active_has_the_bits_of_dense_steps(bundle, variant):
    folder = bundle(variant, **NESTED, weight_dtype="int6")
    with OrtSession(folder, threads=2) as dense, OrtSession(folder, "sparse", threads=2) as sparse:
        found = [next(decoded(session, Budget())) for session in (dense, sparse)]
        assert [dense.decodes, sparse.decodes] == ["dense", "sparse"]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", ["shadow", "quantized-shadow"])
@pytest.mark.parametrize("weight_dtype", ["int8", None])
def test_nothing_is_predicted_if_all_is_active(bundle, kind, weight_dtype):
    folder = bundle(**NESTED | {"kind": kind}, weight_dtype=weight_dtype)
    with OrtSession(folder, "sparse") as session:
        session.set_budget(Budget(shortlist=3))
        assert "predictor" not in session.graphs
        session.set_budget(Budget(neurons=0.5, shortlist=3))
        assert "dense" not in session.graphs


@pytest.mark.parametrize("options", [{"exact": True}, {"native": False}, {"prefill": "sparse"}], ids=str)
def test_sessions_without_native_dense_steps_run_the_body(bundle, options):
    loaded = LoadedBundle(bundle(**NESTED, weight_dtype="int8"), "sparse", **options)
    loaded.load(loaded.plan(Budget(shortlist=3)))
    assert loaded.pieces(loaded.plan(Budget(shortlist=3)))[0] == "stem"
    loaded.close()


def test_its_layers_are_those_of_the_dense_graph(bundle):
    folder = bundle(**NESTED, weight_dtype="int8")
    models = [ir.load(folder / name) for name in ("dense.onnx", "body_all_heads.onnx")]
    graph = onnx.ModelProto.FromString(for_cpu(models, read_manifest(folder), native=True).model).graph
    types = [node.op_type for node in graph.node]
    assert types.count("DenseDecoderLayer") == read_manifest(folder).spec.n_layers
    assert types.count("ShortlistLogits") == 1
    assert "SparseMLP" not in types
    assert {value.name for value in graph.input if "past" not in value.name} == {
        "input_ids", "position_ids", "logits_to_keep", "shortlist", "certify",
    }  # fmt: skip
    assert {value.name for value in graph.output if "present" not in value.name} == {"logits", "recomputed"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_prompts_read_a_table_of_16_bits(bundle, variant, dtype):
    folder, found = bundle(variant, **NESTED, dtype=dtype), []
    for native in (True, False):
        with OrtSession(folder, "sparse", native=native, threads=2) as session:
            session.reset(len(PROMPTS))
            found.append(session.prefill(PROMPTS).copy())
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[1]).max())


def test_no_table_of_16_bits_is_widened_for_prompts(bundle):
    folder = bundle(**NESTED, dtype="bfloat16")
    models = [ir.load(folder / name) for name in ("dense.onnx", "body.onnx")]
    graph = onnx.ModelProto.FromString(for_cpu(models, read_manifest(folder), native=True, prompts=True).model).graph
    tables = {value.name for value in graph.initializer if value.name in ("embed_tokens.weight", "lm_head.weight")}
    readers = {node.op_type for node in graph.node if not tables.isdisjoint(node.input)}
    assert readers == {"Gather", "ShortlistLogits"}
    assert "CachedAttention" not in {node.op_type for node in graph.node}  # it is made for few tokens


@pytest.mark.parametrize(
    ("export", "options"),
    [({}, {}), ({"dtype": "bfloat16"}, {"exact": True}), ({"dtype": "bfloat16", "rest": "drop"}, {})],
    ids=str,
)
def test_other_prompts_have_the_table_of_the_dense_graph(bundle, export, options):
    loaded = LoadedBundle(bundle(**NESTED | export), "sparse", **options)
    loaded.load(loaded.plan(Budget(neurons=0.5)))
    assert "shortlist" not in loaded.prefilling()["dense"].inputs
    loaded.close()


def test_a_session_that_decodes_dense_packs_the_table(bundle):
    """Also if it was sparse before."""
    with OrtSession(bundle(**NESTED, dtype="bfloat16"), "auto", threads=2) as session:
        session.set_budget(Budget(neurons=0.1, rest="drop"))
        session.reset()
        before = session.prefill(PROMPTS[:1]).copy()
        session.set_budget(Budget())
        session.reset()
        np.testing.assert_allclose(session.prefill(PROMPTS[:1]), before, atol=1e-4 * np.abs(before).max())


def test_graphs_without_a_common_table_are_refused(bundle):
    nested, floats = bundle(**NESTED, weight_dtype="int8"), bundle(kind="quantized-shadow", rest="drop")

    def load(folder, name):
        return ir.load(folder / f"{name}.onnx")

    with pytest.raises(ValueError, match="the body has no shortlist"):
        shorten(load(nested, "dense"), load(floats, "body"))
    with pytest.raises(ValueError, match=r"the dense graph has no linear layer that reads copy.* or "):
        shorten(load(floats, "dense"), load(nested, "body"))
