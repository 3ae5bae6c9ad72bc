"""Builds engines from the exporter's own graphs, for models with and without biases, RoPE and gates."""

from __future__ import annotations

import shutil

import pytest
import torch

from shadowllm.bundle.manifest import file_hash
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.config import EngineOptions
from shadowllm.exporter.engines.build import build_engine
from shadowllm.exporter.engines.graph import describe_onnx
from shadowllm.exporter.engines.inspect_engine import engine_contents
from shadowllm.exporter.engines.profiles import profiles_for
from shadowllm.exporter.write_bundle import write_bundle
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from shadowllm.pipeline import build_engines
from tests.bundles import make_bundle
from tests.conftest import build_transformers_model
from tests.exporter.engines.test_build import needs_builder
from tests.exporter.engines.test_library import LIBRARY, needs_library

pytestmark = pytest.mark.slow


def random_predictor(weights) -> Predictor:
    """A shadow of rank 3 for all layers except the first."""
    spec, generator = weights.spec, torch.Generator().manual_seed(0)
    n, heads, neurons = spec.n_layers - 1, spec.n_heads, spec.intermediate_size
    shapes = {
        "heads.scores": (n, heads),
        "neurons.scores": (n, neurons),
        "trunk.weight": (3, spec.hidden_size),
        "trunk.bias": (3,),
        "heads.weight": (n * heads, 3),
        "heads.bias": (n * heads,),
        "neurons.weight": (n * neurons, 3),
        "neurons.bias": (n * neurons,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Predictor("shadow", n, 1, heads, neurons, spec.hidden_size, tensors, weights.fingerprint())


MODELS = {
    # 16 per head: TensorRT-RTX 1.7 has no 16-bit attention for sizes that are no multiple of 8.
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
}


# A build takes seconds, so each kind of plugin is built with one of the families.
CPP = pytest.param("opt", LIBRARY, marks=needs_library, id="opt-c++")
FAMILY_AND_LIBRARY = [pytest.param("llama", None, id="llama-python"), CPP]


# Each 16-bit type is built with one of them too.
@needs_builder
@pytest.mark.parametrize(
    ("family", "library", "dtype"),
    [
        pytest.param("llama", None, "float16", id="llama-python-float16"),
        pytest.param("opt", LIBRARY, "bfloat16", marks=needs_library, id="opt-c++-bfloat16"),
    ],
)
def test_pieces_build_with_all_plugins(tmp_path, family, library, dtype):
    check_pieces(tmp_path, family, MODELS[family], dtype, library)


@needs_builder
def test_pieces_with_sliding_windows_build(tmp_path):
    """The last layer has a window, so only the body differs from that of other models."""
    options = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    check_pieces(tmp_path, "qwen2", options, "float16", None, pieces=("body",))


@needs_builder
def test_pieces_without_biases_build_in_float32(tmp_path):
    check_pieces(tmp_path, "opt", {"enable_bias": False}, "float32", None)


@needs_builder
@pytest.mark.parametrize(("family", "library"), FAMILY_AND_LIBRARY)
def test_a_quantised_shadow_chooses_inside_its_engine(tmp_path, family, library):
    build_transformers_model(family, MODELS[family]).save_pretrained(tmp_path / "model")
    path = tmp_path / "bundle" / "body.onnx"
    path.parent.mkdir()
    make_bundle(tmp_path / "model", path.parent, "float16", "quantized-shadow")
    record = build_engine(
        path,
        tmp_path / "body.engine",
        flavour="tensorrt_rtx",
        profiles=profiles_for(describe_onnx(path), capacity=64, max_seqlen=32, max_batch=2),
        sms=(89,),
        plugin_library=library,
    )
    ops = ["SelectTopK", "SparseAttention", "ScoreNeurons", "SelectTopK", "SparseMLP"]
    assert [node.op for node in record.plugins] == 2 * ops
    assert record.kernels["score_neurons"] == (89,)


@needs_builder
@pytest.mark.parametrize(
    ("family", "library", "kind", "ops"),
    [
        pytest.param("llama", None, "quantized-shadow", ["SparseAttention", "SparseMLP"]),
        pytest.param("opt", LIBRARY, "quantized-shadow", ["SparseAttention", "SparseMLP"], marks=needs_library),
        pytest.param("opt", None, "layerwise", ["SparseAttention", "SelectTopK", "SparseMLP"]),
        pytest.param("llama", LIBRARY, "shadow", ["SparseAttention", "SparseMLP"], marks=needs_library),
    ],
    ids=["llama-quantized-shadow", "opt-quantized-shadow-c++", "opt-layerwise", "llama-shadow-c++"],
)
def test_a_rest_from_the_low_bit_copy(tmp_path, family, kind, ops, library):
    build_transformers_model(family, MODELS[family]).save_pretrained(tmp_path / "model")
    path = tmp_path / "bundle" / "body.onnx"
    path.parent.mkdir()
    make_bundle(tmp_path / "model", path.parent, "float16", kind, rest="shadow")
    # Two sequences with two kept positions each are four rows of logits.
    sizes = {"capacity": 64, "max_seqlen": 32, "max_batch": 2, "max_kept": 2}
    record = build_engine(
        path,
        tmp_path / "body.engine",
        flavour="tensorrt_rtx",
        profiles=profiles_for(describe_onnx(path), **sizes),
        sms=(89,),
        plugin_library=library,
    )
    assert [node.op for node in record.plugins] == [*2 * ops, "ShortlistLogits"]
    assert record.plugins[-1].name == "row_logits.ShortlistLogits"
    assert ("score_heads" in record.kernels) == (kind != "shadow")
    assert {"project_back", "shortlist_logits"} < set(record.kernels)


@needs_builder
@pytest.mark.parametrize(
    ("variant", "kind", "weight_dtype", "library", "sizes"),
    [
        pytest.param("llama-head-dim", "quantized-shadow", "int8", None, (2, 8)),
        pytest.param("llama-mqa-tied", "shadow", "int6", None, (1, 1)),
        pytest.param("opt", "layerwise", "int6", None, (1, 1)),
        pytest.param("opt", "quantized-shadow", "int8", LIBRARY, (1, 1), marks=needs_library),
    ],
    ids=["llama-int8", "llama-int6-shadow", "opt-int6-layerwise", "opt-int8-c++"],
)
def test_bundles_of_nested_integers(bundle, tmp_path, variant, kind, weight_dtype, library, sizes):
    """As `shadowllm build` does it, and what `shadowllm inspect` reads."""
    folder = shutil.copytree(bundle(variant, kind=kind, weight_dtype=weight_dtype, rest="shadow"), tmp_path / "bundle")
    before = {path.name: file_hash(path) for path in folder.iterdir()}
    limits = {"max_batch": sizes[0], "max_seqlen": sizes[1], "capacity": 32}
    records = build_engines(folder, EngineOptions("tensorrt_rtx", sms=(89,), plugin_library=library, **limits))
    assert before == {path.name: file_hash(path) for path in folder.iterdir() if path.is_file()}
    plugins = {piece: [node.name for node in record.plugins] for piece, record in records.items()}
    mlp = "up_proj" if "opt" in variant else "gate_proj+layers.0.up_proj"
    dense = ("q_proj+layers.0.k_proj+layers.0.v_proj", "o_proj", mlp, "down_proj")
    assert plugins["stem"] == ["embed_tokens.rows.NestedGather", *(f"layers.0.{name}.NestedLinear" for name in dense)]
    if kind == "shadow":
        products = [f"predictor.{name}.NestedLinear" for name in ("trunk", "heads", "neurons")]
        assert plugins["predictor"] == [*products, "select_heads.SelectTopK", "select_neurons.SelectTopK"]
    network = (
        [f"predictor.layers.1.{name}.NestedLinear" for name in ("trunk", "neurons")] if kind == "layerwise" else []
    )
    of_layer = [name for name in plugins["body"] if "layers.1" in name]
    key_value = "layers.1.k_proj+layers.1.v_proj.NestedLinear"
    assert of_layer == [key_value, "layers.1.SparseAttention", *network, "layers.1.SparseMLP"]
    assert plugins["body"][-1] == "row_logits.ShortlistLogits"
    layers = {node.name: node.layer for record in records.values() for node in record.plugins}
    assert {layers[name] for name in plugins["stem"][1:]} == {0}
    assert {layers[name] for name in of_layer} == {1}
    assert layers["embed_tokens.rows.NestedGather"] is None
    engines = folder / "engines" / "tensorrt_rtx"
    assert {"gather_rows", "multiply_rows"} == set(engine_contents(engines / "stem.engine").kernels)


PLUGINS = {
    "stem": [],
    "predictor": ["select_heads.SelectTopK", "select_neurons.SelectTopK"],
    "body": [f"layers.{layer}.{op}" for layer in (1, 2) for op in ("SparseAttention", "SparseMLP")],
}


def check_pieces(tmp_path, family, options, dtype, library, pieces=tuple(PLUGINS)) -> None:
    build_transformers_model(family, options).save_pretrained(tmp_path / "model")
    _, weights, files = load_model(tmp_path / "model")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = write_bundle(bundle, family, weights, files, random_predictor(weights), dtype=dtype, budget=Budget())
    for piece in pieces:
        path = bundle / f"{piece}.onnx"
        profiles = profiles_for(describe_onnx(path), capacity=64, max_seqlen=32, max_batch=2)
        record = build_engine(
            path,
            bundle / "engines" / f"{piece}.engine",
            flavour="tensorrt_rtx",
            profiles=profiles,
            sms=(89,),
            file_hashes=manifest.files,
            plugin_library=library,
        )
        assert [node.name for node in record.plugins] == PLUGINS[piece]
        assert record.files == {name: manifest.files[name] for name in (path.name, "model.onnx.data")}
