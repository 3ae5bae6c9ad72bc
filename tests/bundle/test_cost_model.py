"""Compares bytes per decode step with counts by hand and with the number of parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.cost_model import (
    Itemsizes,
    mean_traffic,
    mixed_cost,
    predictor_bytes,
    selector_bytes,
    step_traffic,
    table_cost,
    unit_elements,
)
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.quantisation import NESTED
from shadowllm.bundle.quantised_tensors import CopyTensors
from shadowllm.bundle.weight_names import copied
from shadowllm.bundle.weights import read_weights
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import ActiveCounts, Budget, SparseLayers, layer_units
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.session import OrtSession
from tests.evaluation.speed.tiny_worker import SPEC

SIZES = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "n_layers": 3, "head_dim": 2, "max_seqlen": 16}
LLAMA = replace(SPEC, **SIZES)
OPT = replace(
    LLAMA,
    family="opt",
    n_kv_heads=4,
    norm="layernorm",
    activation="relu",
    gated=False,
    positions="learned",
    rope=None,
    position_offset=2,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


def counts(heads, neurons):
    return ActiveCounts(*(np.array(each, dtype=np.int32) for each in (heads, neurons)))


def test_dense_llama_by_hand():
    parts = step_traffic(LLAMA, Itemsizes.of(4), context=5).parts
    assert parts == {
        "embedding rows": 4 * 6,
        "norms": 4 * 7 * 6,
        "k/v projections": 4 * 3 * 2 * 4 * 6,  # 3 layers, K and V, 2 heads x 2 dims, hidden 6
        "dense layers": 4 * 3 * (2 * 8 * 6 + 3 * 10 * 6),  # q and o rows, gate/up/down rows
        "active q/o rows": 0,
        "active MLP rows": 0,
        "lm_head": 4 * 11 * 6,
        "KV cache": 4 * 3 * 2 * 2 * 5 * 2,  # 3 layers, 2 KV heads, K and V, 5 tokens, 2 dims
        "predictor": 0,
    }


def test_sparse_llama_by_hand():
    parts = step_traffic(LLAMA, Itemsizes.of(2), context=5, active=counts((1, 1), (2, 4)), choosing=77).parts
    assert parts["dense layers"] == 2 * (2 * 8 * 6 + 3 * 10 * 6)
    assert parts["active q/o rows"] == 2 * 2 * (2 * 2 * 6)
    assert parts["active MLP rows"] == 2 * (2 + 4) * 3 * 6
    assert parts["KV cache"] == 2 * (2 + 1 + 1) * 2 * 5 * 2  # one active head reads one of the two KV heads
    assert parts["k/v projections"] == 2 * 3 * 2 * 4 * 6  # K and V stay exact
    assert parts["predictor"] == 77


def test_a_window_bounds_what_is_read_of_the_cache():
    spec = replace(LLAMA, window=3, window_layers=(0, 2))
    found = [
        step_traffic(spec, Itemsizes.of(1), context, active=counts((1, 1), (2, 4))).parts["KV cache"]
        for context in (2, 5)
    ]
    assert found == [
        2 * 2 * (2 * 2 + 1 * 2 + 1 * 2),
        2 * 2 * (2 * 3 + 1 * 5 + 1 * 3),
    ]  # heads x positions of each layer


def test_whole_groups_leave_their_caches_unread():
    active = counts((2, 2), (2, 4))
    found = [
        step_traffic(spec, Itemsizes.of(1), context=5, active=active).parts["KV cache"] / (2 * 5 * 2)
        for spec in (LLAMA, replace(LLAMA, head_unit="kv_group"))
    ]
    assert found == [2 + 2 + 2, 2 + 1 + 1]


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["llama", "opt"])
def test_all_active_reads_what_dense_reads(spec):
    dense = step_traffic(spec, Itemsizes.of(4), context=9)
    sparse = step_traffic(spec, Itemsizes.of(4), context=9, active=Budget().counts(SparseLayers(spec, 1)))
    assert sparse.total == dense.total


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["llama", "opt"])
def test_dense_weights_are_all_parameters(spec):
    parts = step_traffic(spec, Itemsizes.of(1), context=0).parts
    unread_positions = (spec.max_seqlen + spec.position_offset) * spec.hidden_size if spec.positions == "learned" else 0
    # The tied embedding table is counted as lm_head; its one gathered row is read on top.
    assert sum(parts.values()) - parts["embedding rows"] == spec.n_parameters - unread_positions


def test_batch_shares_weights_but_not_caches():
    one, four = (step_traffic(LLAMA, Itemsizes.of(4), context=5, batch=batch).parts for batch in (1, 4))
    assert four["KV cache"] == 4 * one["KV cache"]
    assert four["embedding rows"] == 4 * one["embedding rows"]
    assert four["dense layers"] == one["dense layers"]


@pytest.mark.parametrize(("prompt_len", "new_tokens"), [(7, 4), (128, 128)])
def test_mean_over_a_generation(prompt_len, new_tokens):
    contexts = range(prompt_len + 1, prompt_len + new_tokens)
    mean = sum(step_traffic(LLAMA, Itemsizes.of(4), context).total for context in contexts) / len(contexts)
    assert mean_traffic(LLAMA, Itemsizes.of(4), prompt_len, new_tokens).total == mean


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize(("unit", "part"), [("heads", "active q/o rows"), ("neurons", "active MLP rows")])
def test_a_unit_left_out_saves_its_elements(spec, unit, part):
    every = layer_units(spec)
    found = []
    for count in (every[unit], every[unit] - 1):
        active = every | {unit: count}
        found.append(step_traffic(spec, Itemsizes.of(1), 5, counts([active["heads"]], [active["neurons"]])).parts[part])
    assert found[0] - found[1] == unit_elements(spec, unit)


def test_bytes_of_large_models_do_not_overflow():
    large = replace(LLAMA, hidden_size=1 << 14, intermediate_size=1 << 16, head_dim=1 << 10)
    sparse = step_traffic(large, Itemsizes.of(4), 5, Budget().counts(SparseLayers(large, 1)))
    assert sparse.total == step_traffic(large, Itemsizes.of(4), 5).total > 1 << 32


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


def test_a_16_bit_session_decodes_its_rows_sparse_whenever_the_native_ops_read_them(bundle):
    folder = bundle(dtype="bfloat16")
    for native in (True, False):
        session = OrtSession(folder, native=native)
        session.set_budget(Budget())
        assert session.decodes == ("sparse" if native and native_ops.library() else "dense")


def mixed(shortlist=None, active=None, **sizes):
    found = Itemsizes.of(2, **sizes)
    return step_traffic(LLAMA, found, context=5, active=active, rest="shadow", shortlist=shortlist).parts


def test_a_rest_from_the_low_bit_copy_by_hand():
    row = 32 + 2  # one block of 64 integers of 4 bits, the last of them unused, and a scale
    parts = mixed(active=counts((1, 4), (2, 10)))
    assert parts["low-bit copy"] == row * (4 * 2 * 2 + 10 * 3)  # q and o of 4 heads, gate, up and down of one layer
    assert parts["active q/o rows"] == 2 * (1 + 4) * 2 * 2 * 6
    assert parts["active MLP rows"] == 2 * (2 + 10) * 3 * 6
    assert parts["KV cache"] == 2 * (2 + 2 + 2) * 2 * 5 * 2  # all heads read their keys and values
    parts = mixed(active=counts((4, 4), (2, 10)))
    assert parts["low-bit copy"] == row * 10 * 3


def test_what_every_token_reads_may_have_another_size():
    """K, V and dense layers, and the rows of heads if all of them are active."""
    some, all_heads = (mixed(active=counts(heads, (2, 10)), common=1) for heads in ((1, 4), (4, 4)))
    assert some["k/v projections"] == 3 * 2 * 4 * 6
    assert some["dense layers"] == 2 * 8 * 6 + 3 * 10 * 6
    assert some["active q/o rows"] == 2 * (1 + 4) * 2 * 2 * 6
    assert all_heads["active q/o rows"] == (4 + 4) * 2 * 2 * 6
    assert all_heads["active MLP rows"] == some["active MLP rows"] == 2 * (2 + 10) * 3 * 6


def test_rows_of_all_heads_beside_rows_of_fewer_bits():
    """int6: a product over whole matrices reads 8 bits, for which only the sparse ops have 6."""
    sizes = {"matrices": 4, "rows": 3, "common": 4}
    some, all_heads = (mixed(active=counts(heads, (2, 10)), **sizes) for heads in ((1, 4), (4, 4)))
    assert some["active q/o rows"] == 3 * (1 + 4) * 2 * 2 * 6
    assert all_heads["active q/o rows"] == 4 * (4 + 4) * 2 * 2 * 6
    everything = mixed(active=counts((4, 4), (10, 10)), **sizes)  # without a copy, rows are read where that is cheaper
    assert everything["active q/o rows"] == 3 * (4 + 4) * 2 * 2 * 6


def test_a_shortlist_by_hand():
    parts = mixed(shortlist=3, rows=1)
    assert parts["lm_head"] == 0
    assert parts["low-bit copy"] == 11 * (32 + 2 + 4)  # with the error of each row
    assert parts["shortlist"] == 3 * 6
    for whole in (11, 12, None):
        assert mixed(shortlist=whole) == step_traffic(LLAMA, Itemsizes.of(2), context=5).parts


def test_everything_active_reads_no_copy():
    assert mixed(active=Budget().counts(SparseLayers(LLAMA, 1)))["k/v projections"] > 0
    assert (
        step_traffic(LLAMA, Itemsizes.of(4), 9, Budget().counts(SparseLayers(LLAMA, 1)), rest="shadow").total
        == step_traffic(LLAMA, Itemsizes.of(4), 9).total
    )


def test_a_quantised_shadow_scores_and_computes_the_rest_in_one_pass():
    layers = SparseLayers(LLAMA, 1)
    apart, together = (selector_bytes("quantized-shadow", layers, 4, 0, rest) for rest in ("drop", "shadow"))
    assert apart - together == 2 * 10 * 2 * (32 + 4)  # gate and up of 10 neurons in two layers
    assert together == 4 * 2 * (4 * 7 + 10)  # the fit of the heads, and the norms of down
    # Another number of bits is another copy.
    assert len({selector_bytes("quantized-shadow-2", layers, 4, 0, rest) for rest in ("drop", "shadow")}) == 1


@pytest.mark.parametrize("selector", ["quantized-shadow", "layerwise", "relu"])
def test_the_fit_of_the_heads_is_read_where_heads_are_scored(selector):
    """With all heads and the rest from the copy, the graph has no fit; with the rest dropped, it scores them anyway."""
    layers, fit = SparseLayers(LLAMA, 1), 4 * 2 * 4 * 7
    fewer, every = (Budget(heads=heads, neurons=0.5).counts(layers) for heads in (0.5, 1.0))

    def read(rest, active):
        return selector_bytes(selector, layers, 4, 2, rest, active)

    assert read("shadow", fewer) == read("shadow", every) + fit
    assert read("drop", fewer) == read("drop", every) + (fit if selector == "relu" else 0)
    assert (read("drop", every) == 0) == (selector == "relu")


def test_no_fit_is_read_if_heads_are_never_selected():
    layers = SparseLayers(replace(LLAMA, qk_norm=True), 1)
    active = Budget(heads=0.5, neurons=0.5).counts(layers)
    found = [selector_bytes("quantized-shadow", layers, 4, 0, "drop", counted) for counted in (None, active)]
    assert found[0] - found[1] == 4 * 2 * 4 * 7


def test_nested_rows_by_hand():
    """Beside the copy, an active row costs its residual. Else it costs both parts."""
    q = NESTED["int8"]
    sizes = {"rows": q.itemsize, "beside_copy": q.itemsize_beside_copy}
    parts = mixed(active=counts((1, 4), (2, 10)), shortlist=3, **sizes)
    assert parts["active q/o rows"] == round(2 * 2 * 6 * (1 * 0.5 + 4 * 1.03125))
    assert parts["active MLP rows"] == round(3 * 6 * (2 * 0.5 + 10 * 1.03125))
    assert parts["shortlist"] == 3 * 6 * 0.5
    dropped = step_traffic(LLAMA, Itemsizes.of(2, **sizes), 5, counts((1, 4), (2, 10))).parts
    assert dropped["active MLP rows"] == round(3 * 6 * 12 * 1.03125)


# Sizes of models with which the costs were measured.
SMOLLM2 = replace(SPEC, hidden_size=576, intermediate_size=1536, n_heads=9, n_kv_heads=3, head_dim=64, vocab_size=49152)
BIGGER = replace(SMOLLM2, hidden_size=2048, intermediate_size=5632, n_heads=32, n_kv_heads=4)


def nested(weight_dtype):
    return Itemsizes.of(NESTED[weight_dtype].itemsize, beside_copy=NESTED[weight_dtype].itemsize_beside_copy)


@pytest.mark.parametrize(
    ("spec", "weight_dtype", "pays"), [(SMOLLM2, "int8", 1), (SMOLLM2, "int6", 0), (BIGGER, "int8", 1)]
)
def test_selecting_neurons_pays_where_it_was_faster(spec, weight_dtype, pays):
    """At 10% of them. With int6 the rows of the others are so short that the selection costs more than they do."""
    sizes = nested(weight_dtype)
    some, all_of_them = (
        mixed_cost(spec, "neurons", count, sizes.matrices, sizes.beside_copy)
        for count in (spec.intermediate_size // 10, spec.intermediate_size)
    )
    assert all_of_them == 3 * spec.hidden_size * spec.intermediate_size * sizes.matrices
    assert (some < all_of_them) == pays


def test_selecting_heads_pays_in_large_layers_only():
    sizes = nested("int8")
    for spec, pays in ((SMOLLM2, False), (BIGGER, True)):
        some, all_of_them = (
            mixed_cost(spec, "heads", count, sizes.common, sizes.beside_copy)
            for count in (spec.n_heads // 4, spec.n_heads)
        )
        assert (some < all_of_them) == pays


def test_a_shortlist_pays_unless_it_is_long():
    sizes = nested("int8")
    whole = table_cost(SMOLLM2, None, sizes)
    assert whole == 49152 * 576 * NESTED["int8"].itemsize == table_cost(SMOLLM2, 49152, sizes)
    assert (
        table_cost(SMOLLM2, 256, sizes) < table_cost(SMOLLM2, 4096, sizes) < whole < table_cost(SMOLLM2, 20000, sizes)
    )
