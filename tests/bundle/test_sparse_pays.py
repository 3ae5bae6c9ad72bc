"""When a sparse step pays, and the reasons of layers that stay dense."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shadowllm.bundle.cost_model import predictor_bytes
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.sparse_pays import dense_reasons, sparse_pays
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget


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


def test_dense_layers_have_a_reason(bundle):
    manifest = read_manifest(bundle("llama-blocks", kind="quantized-shadow"))
    found = dense_reasons(manifest, Budget(neurons=(0.99, 0.5)))
    assert list(found) == ["0", "1"]
    assert found["0"] == "comes before the first selection"
    assert found["1"].startswith("does not pay off: its sparse rows and its share of the predictor cost ")
    assert dense_reasons(manifest, Budget(neurons=(1.0, 0.5)), "because")["1"] == "because"


@pytest.mark.parametrize("kind", ["static", "shadow", "layerwise", "quantized-shadow"])
def test_layers_pay_where_the_step_does(bundle, kind):
    """With one budget for all layers, they and the step as a whole agree."""
    manifest = read_manifest(bundle("llama-blocks", kind=kind))
    paying = [sparse_pays(manifest, Budget(neurons=fraction / 96)) for fraction in range(48, 97)]
    assert paying == [len(dense_reasons(manifest, Budget(neurons=fraction / 96))) == 1 for fraction in range(48, 97)]
    assert {True, False} == set(paying)


@pytest.mark.parametrize(("weight_dtype", "pays"), [(None, True), ("int4", False)])
def test_a_copy_of_4_bits_does_not_pay_next_to_weights_of_4_bits(bundle, weight_dtype, pays):
    manifest = read_manifest(bundle("llama-blocks", weight_dtype=weight_dtype, kind="quantized-shadow"))
    assert sparse_pays(manifest, Budget(neurons=0.5)) == pays


@pytest.fixture
def with_copies(bundle):
    """A manifest as of a bundle with copies. The sizes are those of a real model, so that copies are smaller."""
    found = read_manifest(bundle("llama-blocks", kind="quantized-shadow"))
    return replace(found, rest="shadow", spec=replace(found.spec, hidden_size=576, intermediate_size=1536))


def test_a_mixed_step_pays_if_it_reads_less(with_copies):
    assert not sparse_pays(with_copies, Budget())
    assert sparse_pays(with_copies, Budget(neurons=0.1))
    assert sparse_pays(with_copies, Budget(neurons=0.1, rest="drop"))
    assert not sparse_pays(with_copies, Budget(neurons=0.95))  # the copy is 14% of 32 bits
    # The vocabulary has 97 rows, but the fit of the heads and the norms of down must be paid for.
    assert [sparse_pays(with_copies, Budget(shortlist=rows)) for rows in (1, 97)] == [True, False]


def test_a_budget_that_needs_a_copy_is_refused_without_one(bundle):
    with pytest.raises(UserError, match="no low-bit copy"):
        sparse_pays(read_manifest(bundle()), Budget(shortlist=10))


def test_mixed_layers_have_reasons(with_copies):
    found = dense_reasons(with_copies, Budget(neurons=(0.95, 0.5)))
    assert list(found) == ["0", "1"]
    assert "sparse rows and low-bit copy" in found["1"]
    assert list(dense_reasons(with_copies, Budget(shortlist=10))) == ["0", "1", "2"]


@pytest.mark.parametrize("weight_dtype", ["int8", "int6"])
def test_nested_steps_pay_unless_everything_is_active(with_copies, weight_dtype):
    nested = replace(with_copies, weight_dtype=weight_dtype)
    assert not sparse_pays(nested, Budget())
    assert dense_reasons(nested, Budget(), "whole")["1"] == "whole"
    assert sparse_pays(nested, Budget(neurons=0.3))


def test_rounding_what_every_token_reads_counts_unless_everything_is_active(with_copies):
    barely = next(
        Budget(neurons=n / 100) for n in range(99, 0, -1) if sparse_pays(with_copies, Budget(neurons=n / 100))
    )
    more = Budget(neurons=float(barely.neurons) + 0.01)
    assert [sparse_pays(with_copies, more, rounds=rounds) for rounds in (False, True)] == [False, True]
    assert not sparse_pays(with_copies, Budget(), rounds=True)
    assert not sparse_pays(with_copies, Budget(rest="drop"), rounds=True)


def test_a_predictor_that_has_nothing_to_leave_out_costs_nothing(bundle):
    manifest = read_manifest(bundle(kind="shadow", rest="shadow", weight_dtype="int8"))
    spec = replace(manifest.spec, vocab_size=700, hidden_size=128)
    larger = replace(manifest, spec=spec, predictor=manifest.predictor | {"rank": 10_000})
    assert predictor_bytes(larger, 1) > 700 * 128
    assert sparse_pays(larger, Budget(shortlist=16))
    assert not sparse_pays(larger, Budget(neurons=0.9, shortlist=16))
