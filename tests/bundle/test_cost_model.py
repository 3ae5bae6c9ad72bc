"""When a sparse step is worth its predictor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shadowllm.bundle.cost_model import dense_layers, predictor_bytes, sparse_pays
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.quantised_tensors import CopyTensors
from shadowllm.bundle.weight_names import copied
from shadowllm.bundle.weights import read_weights
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.session import OrtSession


@pytest.mark.parametrize("kind", ["shadow", "static"])
def test_bytes_are_those_of_its_tensors(bundle, kind):
    manifest = read_manifest(bundle(kind=kind))
    tensors = read_weights(bundle(kind=kind), manifest).predictor.tensors
    read = [tensor for name, tensor in tensors.items() if name.endswith("scores") == (kind == "static")]
    itemsize = {"shadow": 2, "static": 4}[kind]  # a ranking keeps its float32
    assert predictor_bytes(manifest, 2) == itemsize * sum(tensor.numel() for tensor in read)


def test_layers_read_their_networks_as_weights_and_the_fit_of_the_heads_in_float32(bundle):
    manifest = read_manifest(bundle(kind="layerwise"))
    tensors = read_weights(bundle(kind="layerwise"), manifest).predictor.tensors
    sizes = {name: 4 if ".heads." in name else 2 for name in tensors if name.startswith("layers.")}
    assert predictor_bytes(manifest, 2) == sum(size * tensors[name].numel() for name, size in sizes.items())


@pytest.mark.parametrize("variant", ["llama-blocks", "opt-blocks"])
def test_a_quantised_shadow_reads_its_copy(bundle, checkpoint, variant):
    manifest = read_manifest(bundle(variant, kind="quantized-shadow"))
    spec, weights, _ = load_model(checkpoint(variant))
    copies = CopyTensors(weights)
    names = [name for layer in (1, 2) for name in copied(spec, layer)]
    stored = [copies[f"copy.{name}.{part}"] for name in names for part in ("q", "scales")]
    fit, lengths = 4 * 2 * spec.n_heads * (spec.hidden_size + 1), 4 * 2 * spec.intermediate_size
    assert predictor_bytes(manifest, 4) == fit + lengths + sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_a_step_pays_from_the_first_weight_saved_beyond_the_predictor(bundle, variant):
    manifest = read_manifest(bundle(variant))
    spec, matrices = manifest.spec, 3 if variant.startswith("llama") else 2
    a_neuron = 2 * matrices * spec.hidden_size  # of two sparse layers
    enough = int(predictor_bytes(manifest, 4)) // (4 * a_neuron) + 1
    kept = [(spec.intermediate_size - left_out) / spec.intermediate_size for left_out in (enough, enough - 1)]
    assert [sparse_pays(manifest, Budget(neurons=neurons)) for neurons in kept] == [True, False]
    assert not sparse_pays(manifest, Budget())


def test_heads_count_too(bundle):
    manifest = read_manifest(bundle())
    assert not sparse_pays(manifest, Budget(heads=0.75))
    assert sparse_pays(replace(manifest, predictor={"kind": "static", "rank": 0}), Budget(heads=0.75))


def test_rows_of_16_bits_pay_among_widened_matrices(bundle):
    assert sparse_pays(read_manifest(bundle()), Budget(), narrow_rows=True)


def test_a_16_bit_session_decodes_its_rows_sparse_whenever_the_native_ops_read_them(bundle):
    folder = bundle(dtype="bfloat16")
    for native in (True, False):
        session = OrtSession(folder, native=native)
        session.set_budget(Budget())
        assert session.decodes == ("sparse" if native and native_ops.library() else "dense")


def test_dense_layers_have_a_reason(bundle):
    manifest = read_manifest(bundle("llama-blocks", kind="quantized-shadow"))
    found = dense_layers(manifest, Budget(neurons=(0.99, 0.5)))
    assert list(found) == ["0", "1"]
    assert found["0"] == "comes before the choice"
    assert found["1"].startswith("does not pay: its rows and its share of the predictor cost as ")
    assert dense_layers(manifest, Budget(neurons=(1.0, 0.5)), "because")["1"] == "because"


@pytest.mark.parametrize("kind", ["static", "shadow", "layerwise", "quantized-shadow"])
def test_layers_pay_where_the_step_does(bundle, kind):
    """With one budget for all layers, they and the step as a whole agree."""
    manifest = read_manifest(bundle("llama-blocks", kind=kind))
    paying = [sparse_pays(manifest, Budget(neurons=fraction / 96)) for fraction in range(48, 97)]
    assert paying == [len(dense_layers(manifest, Budget(neurons=fraction / 96))) == 1 for fraction in range(48, 97)]
    assert {True, False} == set(paying)


@pytest.mark.parametrize(("weight_dtype", "pays"), [(None, True), ("int4", False)])
def test_a_copy_of_4_bits_does_not_pay_next_to_weights_of_4_bits(bundle, weight_dtype, pays):
    manifest = read_manifest(bundle("llama-blocks", weight_dtype=weight_dtype, kind="quantized-shadow"))
    assert sparse_pays(manifest, Budget(neurons=0.5)) == pays
