"""The native op with nested integers: residuals complete the low-bit copy; see `mixed_inputs`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED, Quantisation, unpacked
from tests.plugins.native_model import REFUSED, built, ints, run, run_all, scalar
from tests.plugins.ops.sparse_mlp.mixed_inputs import MIXED_WEIGHTS, Rounding, check, mixed_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_FORMS

pytestmark = built
FORMATS = pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)

CASES = [  # D, F, B, S, count
    ("relu-gated", (41, 7, 1, 1, 3)),
    ("opt", (123, 88, 3, 5, 88)),
    ("llama-biases", (123, 88, 1, 1, 0)),
    ("llama-biases", (123, 88, 3, 50, 20)),  # more tokens than share one read of the weights
    ("opt", (576, 1536, 1, 1, 154)),
    ("llama-biases", (576, 400, 1, 1, 400)),
    ("relu-gated", (64, 88, 1, 2, 87)),
    ("llama-biases", (1, 1, 1, 1, 1)),
]


@FORMATS
@pytest.mark.parametrize("choosing", [False, True], ids=["given", "chosen"])
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize(("form", "size"), CASES, ids=str)
def test_nested_mlp(form, size, rest, choosing, q, isa):
    inputs, activation = mixed_inputs(form, size, rest=rest, choosing=choosing, q=q), MLP_FORMS[form][0]
    check(inputs, activation, rounds=isa != "portable")
    check(inputs, activation, rounds=False, exact_copies=1)


@pytest.mark.parametrize(("form", "size"), CASES[-4:], ids=str)
def test_exact_products_of_blocks_of_32(form, size, isa):
    """Residuals of 2 bits have no kernel that reads inputs of 16 bits, as other rows in such blocks have."""
    inputs = mixed_inputs(form, size, q=replace(NESTED["int6"], block=32))
    check(inputs, MLP_FORMS[form][0], rounds=False, exact_copies=1)
    # Scales with more digits than bfloat16 has are not stored in 16 bits. Then no input is rounded either.
    scales = {name: value * np.float32(1.001) for name, value in inputs.items() if name.startswith("cs_")}
    check(inputs | scales, MLP_FORMS[form][0], rounds=False)


@FORMATS
def test_residuals_alone(q, isa):
    """If the copy is zero, the result is that of a copy with the values of the residuals."""
    inputs = mixed_inputs("llama", (576, 88, 1, 1, 88), q=q)
    copies = {}
    for part in ("gate", "up", "down"):
        scales, values = inputs[f"cs_{part}"], unpacked(inputs[f"w_{part}"], q.residual_bits)
        inputs[f"c_{part}"] = np.full_like(inputs[f"c_{part}"], 0x88)
        four = values + np.uint8(8 - (1 << (q.residual_bits - 1)))
        copies[f"c_{part}"] = (four[:, ::2] | four[:, 1::2] << 4).reshape(*scales.shape, q.block // 2)
        copies[f"cs_{part}"] = scales * np.float32(q.residual_step)
    as_copy = inputs | copies | {"count": scalar(0)}
    found, wanted = (run("SparseMLP", of, MIXED_WEIGHTS, activation="silu", layer=0) for of in (inputs, as_copy))
    bound = 12 * Rounding.of(as_copy, "silu").y if isa != "portable" else 0
    assert np.abs(wanted).max() > 0
    assert (np.abs(found - wanted) <= bound + 1e-5 * np.abs(wanted).max()).all()


@FORMATS
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize("size", [(576, 1536, 1, 1, 154), (123, 88, 2, 5, 40), (960, 41, 1, 9, 41)], ids=str)
def test_one_result_with_any_threads_and_any_source(size, rest, q, isa):
    """Only of constant weights are there tiles, in which whole groups of rows are read, or records."""
    inputs = mixed_inputs("llama-biases", size, rest=rest, q=q)
    expected = run_all("SparseMLP", inputs, MIXED_WEIGHTS, 1, activation="silu", layer=0)
    for weights, threads in ((MIXED_WEIGHTS, 2), ((), 1)):
        found = run_all("SparseMLP", inputs, weights, threads, activation="silu", layer=0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@FORMATS
@pytest.mark.parametrize("active", [range(9, 49), [*range(16, 30), 31, 40, *range(48, 64)]], ids=["later", "gaps"])
def test_groups_of_rows_that_are_no_tiles(active, q, isa):
    inputs = mixed_inputs("llama-biases", (576, 88, 1, 1, len(active)), rest=0, choosing=False, q=q)
    inputs["indices"][: len(active)] = active
    constant, given = (
        run_all("SparseMLP", inputs, weights, activation="silu", layer=0) for weights in (MIXED_WEIGHTS, ())
    )
    for one, other in zip(constant, given, strict=True):
        np.testing.assert_array_equal(one, other)


@FORMATS
@pytest.mark.parametrize("block", [32, 96, 128])
def test_other_blocks_are_not_rounded(block, q, isa):
    q = Quantisation(q.bits, block, q.residual_bits)
    check(mixed_inputs("llama", (123, 88, 1, 1, 30), q=q), "silu", rounds=False)


@FORMATS
@pytest.mark.parametrize("count", [20, 88])
def test_what_is_no_number_is_not_hidden(count, q, isa):
    inputs = mixed_inputs("llama", (128, 88, 1, 1, count), q=q)
    inputs["x"][0, 0, 70] = np.nan
    assert not np.isfinite(run("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=0)).any()


@FORMATS
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_up": np.zeros((7, 100), np.uint8)}, r"w_up has shape \(7, 100\), not \(7, 64\)"),
        ({"w_down": np.zeros((6, 64), np.uint8)}, r"w_down has shape \(6, 64\), not \(7, 64\)"),
        (
            {"w_gate": np.zeros((7, 123), np.float32)},
            "some matrices are residuals of the low-bit copy, and others are not",
        ),
        ({"indices": ints(0, 2, 1, -1, -1, -1, -1)}, "the indices are not in ascending order"),
        ({"indices": ints(0, 2, 2, -1, -1, -1, -1)}, "the indices are not in ascending order"),
    ],
)
def test_wrong_inputs_are_named(changes, words, q):
    inputs = mixed_inputs("llama", (123, 7, 1, 2, 3), choosing=False, q=q) | changes
    with pytest.raises(REFUSED, match=f"SparseMLP layer 11: {words}"):
        run("SparseMLP", inputs, MIXED_WEIGHTS, activation="silu", layer=11)
