"""The native op with a low-bit copy: the rest of the neurons, and the choice inside the op; see `mixed_inputs`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation
from tests.plugins.native_model import REFUSED, STORED, built, ints, run, run_all, scalar, stored, zeros
from tests.plugins.ops.sparse_mlp.mixed_inputs import COPIES, MIXED_WEIGHTS, check, mixed_inputs, with_copy
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_FORMS, MLP_WEIGHTS, mlp_inputs

pytestmark = built

SIZES = [  # D, F, B, S, count
    (41, 7, 1, 1, 3),
    (41, 7, 2, 3, 1),
    (123, 88, 1, 1, 45),
    (123, 88, 3, 5, 88),
    (123, 88, 1, 1, 0),
    (123, 88, 1, 2, 0),
    (123, 88, 3, 50, 20),  # more tokens than share one read of the weights
    (576, 1536, 1, 1, 154),
    (576, 1536, 1, 1, 1536),
    (576, 1536, 2, 3, 300),
    (64, 88, 1, 1, 87),
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, 0),
]
# More columns than kernels add in one pass, and 17 blocks, whose last one has a vector of scales of its own
WIDE = [(4250, 40, 1, seqlen, 9) for seqlen in (1, 2, 5)] + [(1030, 20, 1, seqlen, 9) for seqlen in (1, 3)]


@pytest.mark.parametrize("choosing", [False, True], ids=["given", "chosen"])
@pytest.mark.parametrize(
    ("form", "size", "rest"),
    [("llama-biases", size, rest) for size in SIZES for rest in (0, 1)]
    + [(form, size, 1) for form in MLP_FORMS if form != "llama-biases" for size in SIZES[2:4]]
    + [("llama-biases", size, 1) for size in WIDE],
    ids=str,
)
def test_mixed_mlp(form, size, rest, choosing, isa):
    check(mixed_inputs(form, size, rest=rest, choosing=choosing), MLP_FORMS[form][0], rounds=isa != "portable")


@pytest.mark.parametrize("indices", [[0] * 7, [6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 3, 3, 3, 3]], ids=str)
def test_as_many_indices_as_neurons(indices, isa):
    inputs = mixed_inputs("llama-biases", (41, 7, 1, 2, 7), choosing=False) | {"indices": ints(*indices)}
    check(inputs, "silu", rounds=False, exact_copies=1)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [(123, 88, 1, 1, 30), (123, 88, 2, 3, 30)], ids=str)
def test_full_rows_of_two_bytes(size, dtype, isa):
    inputs = stored(mixed_inputs("llama-biases", size), MLP_WEIGHTS, dtype)
    check(inputs, "silu", rounds=isa != "portable")


@pytest.mark.parametrize("block", [32, 96, 128])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_other_blocks_of_the_copy_are_not_rounded(block, seqlen, isa):
    inputs = with_copy(mlp_inputs("llama", (123, 88, 1, seqlen, 30)), q=Quantisation(4, block))
    check(inputs, "silu", rounds=False)


def test_one_result_with_any_threads_and_any_source(isa):
    inputs = mixed_inputs("llama-biases", (576, 1536, 1, 1, 154))
    expected = run_all("SparseMLP", inputs, MIXED_WEIGHTS, 1, activation="silu", layer=0)
    for weights, threads in ((MIXED_WEIGHTS, 2), (MIXED_WEIGHTS, 3), ((), 1)):
        found = run_all("SparseMLP", inputs, weights, threads, activation="silu", layer=0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_everything_full_reads_no_copy(isa):
    """The result is that of the op without a copy, bit for bit, and the copy may be spoilt."""
    inputs = mixed_inputs("llama", (123, 88, 1, 2, 88)) | {"cs_up": np.full((88, 2), np.nan, dtype=np.float32)}
    plain = mlp_inputs("llama", (123, 88, 1, 2, 88))
    expected = run("SparseMLP", plain, MLP_WEIGHTS, activation="silu", layer=0)
    np.testing.assert_array_equal(run("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=0), expected)


def test_ties_go_to_the_lower_index(isa):
    inputs = mlp_inputs("opt-untied", (64, 40, 1, 1, 9))
    for name in ("w_up", "w_down"):
        inputs[name] = np.repeat(inputs[name][:1], 40, axis=0)
    inputs["x"] = np.abs(inputs["x"]) * np.sign(inputs["w_up"][0])  # nothing is zero after the ReLU
    inputs["w_up"][[5, 30]] *= 2
    _, chosen = run_all("SparseMLP", with_copy(inputs), MIXED_WEIGHTS, activation="relu", layer=0)
    assert chosen.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 30] + 31 * [-1]


@pytest.mark.parametrize("choosing", [False, True], ids=["given", "chosen"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", ["llama", "opt", "relu-gated", "galactica"])
def test_what_is_no_number_is_not_hidden(form, value, choosing, isa):
    inputs = mixed_inputs(form, (128, 88, 1, 1, 20), choosing=choosing)
    inputs["x"][0, 0, 70] = value
    with np.errstate(invalid="ignore"):
        found = run("SparseMLP", inputs, MIXED_WEIGHTS, activation=MLP_FORMS[form][0], layer=0)
    assert not np.isfinite(found).any()


def test_more_indices_than_neurons_stay_inside_the_output():
    """Indices that repeat can be more than the neurons; the output keeps the first."""
    inputs = mixed_inputs("llama", (41, 7, 1, 1, 3), choosing=False)
    inputs |= {"indices": ints(*([2] * 4000)), "count": scalar(4000)}
    _, chosen = run_all("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=0)
    assert chosen.tolist() == 7 * [2]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape):
    y, chosen = run_all(
        "SparseMLP", mixed_inputs("llama", (41, 7, *shape, 3)), MIXED_WEIGHTS, activation="silu", layer=0
    )
    assert y.shape == (*shape, 41)
    assert chosen.tolist() == [0, 1, 2, -1, -1, -1, -1]


WITHOUT = [
    (("c_up",), "c_up and cs_up must stand together"),
    (("cs_down",), "c_down and cs_down must stand together"),
    (("c_gate", "cs_gate"), "must have the matrices of the layer, but c_gate is missing"),
    (("c_down", "cs_down"), "must have the matrices of the layer, but c_down is missing"),
    (("c_up", "cs_up"), "must have the matrices of the layer, but c_gate stands alone"),
    (("w_gate", "b_gate"), "must have the matrices of the layer, but c_gate stands alone"),
    (("down_norms",), "without indices, the neurons are chosen with a low-bit copy and down_norms"),
    (COPIES, "without indices, the neurons are chosen with a low-bit copy and down_norms"),
]


@pytest.mark.parametrize(("names", "words"), WITHOUT)
def test_parts_that_are_missing_are_named(names, words):
    inputs = mixed_inputs("llama-biases", (123, 7, 1, 2, 3)) | dict.fromkeys(names)
    with pytest.raises(REFUSED, match=f"SparseMLP layer 11: .*{words}"):
        run("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": scalar(8)}, r"count 8 is outside 0\.\.7"),
        ({"count": scalar(-1)}, r"count -1 is outside 0\.\.7"),
        ({"count": ints(1, 2)}, "count has 2 elements, not 1"),
        ({"rest": ints(1, 1)}, "rest has 2 elements, not 1"),
        ({"down_norms": zeros(6)}, r"down_norms has shape \(6\), not \(7\)"),
        ({"cs_up": zeros(7, 1)}, r"cs_up has shape \(7, 1\), not \(7, 2\)"),
        ({"c_up": np.zeros((7, 64), np.uint8)}, r"c_up has shape \(7, 64\), not \(rows, blocks, bytes\)"),
        ({"c_up": np.zeros((7, 2, 24), np.uint8)}, r"c_up has shape \(7, 2, 24\), not \(rows, blocks, bytes\)"),
        ({"c_up": np.zeros((7, 2, 0), np.uint8)}, r"c_up has shape \(7, 2, 0\), not \(rows, blocks, bytes\)"),
        ({"c_down": np.zeros((7, 3, 32), np.uint8)}, r"c_down has shape \(7, 3, 32\), not \(7, 2, 32\)"),
        ({"c_gate": np.zeros((6, 2, 32), np.uint8)}, r"c_gate has shape \(6, 2, 32\), not \(7, 2, 32\)"),
        (
            {"c_down": np.zeros((7, 4, 16), np.uint8), "cs_down": zeros(7, 4)},
            "the matrices of the low-bit copy have blocks of different sizes",
        ),
    ],
)
def test_wrong_inputs_are_named(changes, words):
    inputs = mixed_inputs("llama-biases", (123, 7, 1, 2, 3)) | changes
    with pytest.raises(REFUSED, match=f"SparseMLP layer 11: {words}"):
        run("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=11)


def test_a_rest_needs_a_copy():
    with pytest.raises(REFUSED, match="rest is 1, but there is no low-bit copy"):
        run(
            "SparseMLP",
            mlp_inputs("llama", (41, 7, 1, 1, 3)) | {"rest": scalar(1)},
            MLP_WEIGHTS,
            activation="silu",
            layer=0,
        )
